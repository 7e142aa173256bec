"""Who divides the loss of accumulated batches, asked of every model class of transformers that can be built tiny."""

import warnings

import pytest
import torch

import models
from rankwise.nets.undisturbed import undisturbed
from rankwise.train.scaling import scales


def gradients(model, batches, **named):
    model.zero_grad()
    for batch in batches:
        model(**batch, **named).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.large
@pytest.mark.parametrize("task", models.CLASS_TASKS)
def test_what_a_loss_answers_makes_accumulated_gradients_those_of_the_whole_batch(task):
    answers, wrong = {True: 0, False: 0}, []
    for name in models.class_names(task):
        model = models.of_class(name)
        if model is None:
            continue
        batch = models.class_batch(name)
        # as the Trainer counts: causal models predict all tokens but the first
        labels = batch["labels"][:, 1:] if task == "causal" else batch["labels"]

        def loss(items, model=model, batch=batch):
            with undisturbed(model):
                return float(model(**batch, num_items_in_batch=torch.tensor(items)).loss)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of models that are old
            answer = scales(loss, labels.numel())
            pieces = [{key: value[start : start + 2] for key, value in batch.items()} for start in range(0, 8, 2)]
            whole = gradients(model, [batch])
            if answer:
                summed = gradients(model, pieces, num_items_in_batch=torch.tensor(labels.numel()))
            else:
                summed = [grad / len(pieces) for grad in gradients(model, pieces)]
        worst = max(float((a - b).abs().max()) for a, b in zip(whole, summed, strict=True))
        if worst > 1e-4 * max(float(a.abs().max()) for a in whole):
            wrong.append(name)
        answers[bool(answer)] += 1
    assert not wrong
    assert sum(answers.values()) >= 10
    assert answers[False] and (answers[True] or task != "causal"), answers


@pytest.mark.parametrize(
    ("loss", "answer"),
    [
        (lambda n: 8 / n, True),
        (lambda n: 2.0, False),
        (lambda n: 8 / n + 0.01, False),  # plus the loss of a router
        (lambda n: float("nan"), None),
        (lambda n: 0.0, None),
    ],
)
def test_a_loss_is_divided_by_the_count_as_a_whole_or_not_at_all(loss, answer):
    assert scales(loss, 4) is answer
