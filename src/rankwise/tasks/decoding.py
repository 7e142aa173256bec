"""The most likely text after each prompt: greedy and beam search with the answers of transformers' own, in less time.

transformers reads each prompt once for every beam, and goes on with all rows until the last is done. Here a prompt is
read once, and a row leaves the batch when it is done. Nothing else differs: what the model gets, its cache, the rules
for tokens and the scores are those of transformers, whose own loops search where the cache is not the usual one.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GenerationMixin

BARRED = -1e9
"""What is added to the score of a beam that must not be chosen, as in transformers."""

Rule = Callable[[Tensor, Tensor], Tensor]
Ended = Callable[[Tensor, Any], Tensor]


def search(
    model: Any,
    input_ids: Tensor,
    logits_processor: Rule,
    stopping_criteria: Ended,
    generation_config: GenerationConfig,
    **model_kwargs: Any,
) -> Tensor:
    """Each prompt with what is most likely written after it, padded on the right: for `generate(custom_generate=)`.

    Args:
        input_ids: (rows · beams, tokens); each prompt stands there once for each beam.
    """
    beams = generation_config.num_beams or 1
    if not _usual(model, input_ids, model_kwargs):
        loop = type(model)._sample if beams == 1 else type(model)._beam_search
        return loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
    find = _greedy if beams == 1 else _beam_search
    return find(_Steps(model, model_kwargs), input_ids, logits_processor, stopping_criteria, generation_config)


def _usual(model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the model writes as most do, with an empty cache, and all that it is given has a row for each prompt."""
    cache: Any = kwargs.get("past_key_values")
    both = type(cache) is EncoderDecoderCache
    caches = [cache.self_attention_cache, cache.cross_attention_cache] if both else [cache]
    given, *encoded = ([each for each in values.values() if isinstance(each, Tensor)] for values in _dicts(kwargs))
    return (
        all(getattr(type(model), loop) is getattr(GenerationMixin, loop) for loop in ("_sample", "_beam_search"))
        and not hasattr(model, "_reorder_cache")
        and bool(kwargs.get("use_cache"))
        and all(type(each) is DynamicCache and not each.get_seq_length() for each in caches)
        and all(each.dim() == 2 for each in given)  # some models have positions (axes, rows, tokens)
        and all(len(each) == len(input_ids) for each in (*given, *itertools.chain(*encoded)))
    )


def _dicts(kwargs: dict[str, Any]) -> list[dict[str, Any]]:
    """The arguments, and the outputs of the encoder among them."""
    return [kwargs, *(value for value in kwargs.values() if isinstance(value, dict))]


class _Steps:
    """The model's forward passes: what it gets besides the tokens, and its cache."""

    def __init__(self, model: Any, kwargs: dict[str, Any]) -> None:
        self.model, self.kwargs = model, kwargs

    def first(self, ids: Tensor, beams: int) -> Tensor:
        """As `next`, for prompts that stand in `ids` once for each beam, but are read once."""
        once = torch.arange(0, len(ids), beams, device=ids.device)
        self.select(once)
        logits = self._forward(ids[once], is_first_iteration=True)
        self.select(each := torch.arange(len(once), device=ids.device).repeat_interleave(beams))
        return logits[each]

    def next(self, ids: Tensor) -> Tensor:
        """The logits (rows, vocabulary) of the token after each of `ids` (rows, tokens), in fp32."""
        return self._forward(ids, next_sequence_length=1)

    def _forward(self, ids: Tensor, **how: Any) -> Tensor:
        inputs = self.model.prepare_inputs_for_generation(ids, **how, **self.kwargs)
        outputs = self.model(**inputs, return_dict=True)
        encodes = self.model.config.is_encoder_decoder
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs, is_encoder_decoder=encodes)
        return outputs.logits[:, -1].to(copy=True, dtype=torch.float32)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows; one may be taken several times."""
        for values in _dicts(self.kwargs):
            for name, value in values.items():
                if isinstance(value, Tensor):
                    values[name] = value[rows]
        self.kwargs["past_key_values"].reorder_cache(rows)

    def reorder(self, rows: Tensor) -> None:
        """The same where each row is replaced by one that has read the same prompt."""
        cache = self.kwargs["past_key_values"]
        getattr(cache, "self_attention_cache", cache).reorder_cache(rows)


def _greedy(steps: _Steps, ids: Tensor, rule: Rule, ended: Ended, config: Any) -> Tensor:
    """The most likely token at each step."""
    written = ids.new_full((len(ids), config.max_length), config.pad_token_id)
    rows, logits = torch.arange(len(ids), device=ids.device), steps.first(ids, 1)
    with steps.model._optimize_model_for_decode():
        while True:
            ids = torch.cat([ids, rule(ids, logits).argmax(-1)[:, None]], 1)
            written[rows, : ids.shape[1]] = ids
            left = (~ended(ids, None)).nonzero().flatten()
            if not len(left):
                return written
            if len(left) < len(ids):
                ids, rows = ids[left], rows[left]
                steps.select(left)
            logits = steps.next(ids)


def _beam_search(steps: _Steps, ids: Tensor, rule: Rule, ended: Ended, config: Any) -> Tensor:
    """The text of the best score, its log-probability / length^p, among those that the beams find.

    A row is done when it has as many texts as beams, and no beam is better than the worst of them at its length so far.
    """
    n, start, size, power = config.num_beams, ids.shape[1], config.max_length, config.length_penalty
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    logits = steps.first(ids, n)
    beams = ids.view(-1, n, start)
    rows = torch.arange(len(beams), device=ids.device)
    written = ids.new_full((len(beams), size), config.pad_token_id)
    texts = written[:, None].repeat(1, n, 1)
    scores = logits.new_tensor([0.0] + [BARRED] * (n - 1)).repeat(len(beams), 1)  # all beams are the same prompt
    best, found = torch.full_like(scores, BARRED), torch.zeros_like(scores, dtype=torch.bool)
    while True:
        words = logits.shape[1]
        likely = rule(beams.flatten(0, 1), logits.log_softmax(-1)).view(*scores.shape, words) + scores[..., None]
        likely, place = likely.flatten(1).topk(max(2, 1 + len(ends)) * n)  # of which at least n do not end
        source = place // words
        grown = torch.cat([_taken(beams, source), (place % words)[..., None]], -1)
        length = (grown.shape[-1] - start) ** power
        end = ended(grown.flatten(0, 1), None).view(source.shape)
        going = likely + end * BARRED
        scores, chosen = going.topk(n)
        beams, source = _taken(grown, chosen), source.gather(1, chosen)
        text = end & (torch.arange(end.shape[1], device=end.device) < n)
        best, chosen = torch.cat([best, likely / length + ~text * BARRED], 1).topk(n)
        grown = torch.nn.functional.pad(grown, (0, size - grown.shape[-1]), value=config.pad_token_id)
        texts = _taken(torch.cat([texts, grown], 1), chosen)
        found = torch.cat([found, text], 1).gather(1, chosen)
        worst = torch.where(found, best.min(1, keepdim=True).values, BARRED)
        done = ~(scores[:, :1] / length > worst).any(1) | end.all(1)
        written[rows] = texts[:, 0]
        left = (~done).nonzero().flatten()
        if not len(left):
            return written
        from_row = source + n * torch.arange(len(rows), device=rows.device)[:, None]
        if len(left) < len(rows):
            rows, beams, scores, best, texts, found, from_row = (
                each[left] for each in (rows, beams, scores, best, texts, found, from_row)
            )
            steps.select(from_row.flatten())
        else:
            steps.reorder(from_row.flatten())
        logits = steps.next(beams.flatten(0, 1))


def _taken(values: Tensor, places: Tensor) -> Tensor:
    """Of values (rows, m, tokens) those at `places` (rows, k): (rows, k, tokens)."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))
