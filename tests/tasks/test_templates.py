"""Which tokens of a conversation are learnt: by hand for the templates of five models; what templates must keep."""

import functools
import itertools
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import chats
from asserts import refused
from chats import turns
from rankwise.tasks.templates import Conversation, Template

TWO = turns("Hi", "Hello you!", " Sum? ", "2\n")

# Learnt tokens have a star. Ġ is a space and Ċ a line's end, as byte-level tokenizers write them.
BY_HAND = {
    "smollm2": (
        "<|im_start|> system Ċ You Ġare Ġa Ġhelpful ĠAI Ġassistant Ġnamed ĠSm ol LM , Ġtrained Ġby ĠH ugging ĠFace "
        "<|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> ass istant Ċ *Hello *Ġyou *! *<|im_end|> *Ċ "
        "<|im_start|> user Ċ ĠSum ? Ġ <|im_end|> Ċ <|im_start|> ass istant Ċ *2 *Ċ *<|im_end|> *Ċ"
    ),
    "llama3": (
        "<|begin_of_text|> <|start_header_id|> user <|end_header_id|> Ċ Ċ Hi <|eot_id|> "
        "<|start_header_id|> ass istant <|end_header_id|> ĊĊ *Hello *Ġyou *! *<|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> Ċ Ċ Sum ? <|eot_id|> "
        "<|start_header_id|> ass istant <|end_header_id|> ĊĊ *2 *<|eot_id|>"
    ),
    "gemma": (
        "<bos> <start_of_turn> user Ċ Hi <end_of_turn> Ċ <start_of_turn> model Ċ *Hello *Ġyou *! *<end_of_turn> *Ċ "
        "<start_of_turn> user Ċ Sum ? <end_of_turn> Ċ <start_of_turn> model Ċ *2 *<end_of_turn> *Ċ"
    ),
    "mistral": (
        "<s> [INST] ĠHi [/INST] *ĠHello *Ġyou *! *</s> [INST] Ġ ĠSum ? Ġ [/INST] *Ġ *2 *</s>"
    ),
    "qwen2_5": (
        "<|im_start|> system Ċ You Ġare ĠQ wen , Ġcreated Ġby ĠAl ib aba ĠCloud . ĠYou Ġare Ġa Ġhelpful Ġassistant . "
        "<|im_end|> Ċ <|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> ass istant Ċ *Hello *Ġyou *! *<|im_end|> *Ċ "
        "<|im_start|> user Ċ ĠSum ? Ġ <|im_end|> Ċ <|im_start|> ass istant Ċ *2 *Ċ *<|im_end|> *Ċ"
    ),
}  # fmt: skip


def encoded(tokenizer, messages, text="", **more):
    conversation = Conversation(messages, "chats.jsonl, line 3", **more)
    [(ids, answers)] = Template.of(tokenizer, text, "my.jinja").encode([conversation])
    return ids, answers


def marked(tokenizer, messages, text="", **more):
    ids, answers = encoded(tokenizer, messages, text, **more)
    learnt = {place for start, stop in answers for place in range(start, stop)}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return " ".join("*" * (place in learnt) + token for place, token in enumerate(tokens))


@pytest.mark.parametrize("name", BY_HAND)
def test_answers_and_what_ends_them_are_learnt_and_nothing_else(name):
    assert marked(chats.tokenizer(name), TWO) == BY_HAND[name]


@pytest.mark.parametrize("name", BY_HAND)
def test_the_tokens_of_several_conversations_are_those_of_each_alone(name):
    tokenizer = chats.tokenizer(name)
    different = [TWO, turns("One", "1"), TWO[:2], turns("\n Two\n\n", "\n\n 2")]
    together = Template.of(tokenizer, "", "").encode([Conversation(each, "") for each in different])
    assert [*together] == [encoded(tokenizer, each) for each in different]


known = functools.cache(chats.tokenizer)
WORDS = st.text(st.sampled_from(string.ascii_letters + " \n.é漢🙂"), min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", BY_HAND)
@settings(max_examples=30)
@given(texts=st.lists(WORDS, min_size=1, max_size=3).map(lambda texts: [*texts, *texts]))
def test_a_prompt_has_the_tokens_that_a_model_is_asked_with(name, texts):
    """And the answer, after a prompt, is all that the template writes of it, to its end."""
    tokenizer = known(name)
    messages = turns(*texts)
    ids, answers = encoded(tokenizer, messages)
    assert len(answers) == len(texts) // 2
    first = messages[:1]
    prompt = tokenizer.apply_chat_template(first, add_generation_prompt=True)["input_ids"]
    assert ids[: answers[0].start] == prompt
    for number, (start, stop) in enumerate(answers):
        written = tokenizer.decode(ids[start:stop])
        assert texts[2 * number + 1].strip() in written
        asked = tokenizer.apply_chat_template(messages[: 2 * number + 1], add_generation_prompt=True, tokenize=False)
        whole = tokenizer.apply_chat_template(messages[: 2 * number + 2], tokenize=False)
        assert written == whole[len(asked) :] and tokenizer.decode(ids[:start]) == asked


@pytest.mark.parametrize("name", ["cohere", "gemma3", "glm4moe", "lfm2", "phi3_5", "qwen2_5_vl", "qwen3"])
def test_the_learnt_tokens_are_those_that_trl_marks_in_its_templates(name):
    """TRL has put the marks that `return_assistant_tokens_mask` needs into copies of the models' templates.

    Phi 3.5 is the model of https://github.com/axolotl-ai-cloud/axolotl/issues/1916.
    """
    tokenizer = chats.tokenizer(f"{name}_training")
    for messages in (TWO[:2], TWO):
        ids, answers = encoded(tokenizer, messages)
        theirs = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert theirs["input_ids"] == ids
        learnt = [place for place, mask in enumerate(theirs["assistant_masks"]) if mask]
        assert learnt == [place for start, stop in answers for place in range(start, stop)]


def test_a_system_turn_is_read_and_not_learnt():
    said = marked(chats.tokenizer("llama3"), turns("Hi", "Yes", system="Be short."))
    assert said.startswith("<|begin_of_text|> <|start_header_id|> system <|end_header_id|> Ċ Ċ Be Ġshort . <|eot_id|> ")


def test_there_is_one_begin_token_if_tokenizer_and_template_both_write_it():
    """https://github.com/OpenRLHF/OpenRLHF/issues/393, https://github.com/huggingface/trl/issues/1400"""
    tokenizer = chats.tokenizer("llama3")
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", begin)]
    )
    assert tokenizer("Hi")["input_ids"][0] == begin
    ids, _ = encoded(tokenizer, TWO)
    assert ids.count(begin) == 1 and ids[0] == begin


def test_the_end_of_a_turn_is_learnt_though_it_is_not_the_tokenizers_end_token():
    """https://github.com/axolotl-ai-cloud/axolotl/issues/3754: Gemma's was never learnt, and models did not stop."""
    tokenizer = chats.tokenizer("gemma")
    assert tokenizer.eos_token == "<eos>"
    assert marked(tokenizer, TWO).count("*<end_of_turn>") == 2


def test_a_template_that_ends_no_turn_is_refused():
    """https://github.com/huggingface/trl/pull/5988: GLM ends an answer with the next turn's marker."""
    for messages in (TWO, TWO[:2]):
        said = refused(lambda messages=messages: encoded(chats.tokenizer("glm4moe"), messages))
        assert said.startswith("chats.jsonl, line 3: the tokenizer's chat template ")
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    said = refused(lambda: encoded(chats.tokenizer("smollm2"), TWO, plain))
    assert said == (
        "chats.jsonl, line 3: the template my.jinja ends turn 2 without a special token, so that a model would not "
        "learn to stop: correct the row, or give a template of your own (template: FILE)"
    )


def test_a_template_that_writes_earlier_turns_differently_is_refused():
    """Qwen3 writes <think></think> into the last answer only, and removes thinking from earlier ones."""
    qwen3 = chats.tokenizer("qwen3")
    said = refused(lambda: encoded(qwen3, TWO))
    assert "the tokenizer's chat template writes turn 2 differently once others follow" in said
    ids, [answer] = encoded(qwen3, TWO, learnt=[False, False, False, True])  # no other answer has to be found
    assert qwen3.decode(ids[answer.start : answer.stop]) == "<think>\n\n</think>\n\n2\n<|im_end|>\n"
    thought = turns("Hi", "<think>\nHm.\n</think>\n\nHello", "Sum?", "2")
    assert "leaves out or changes turn 2, of the role assistant" in refused(lambda: encoded(qwen3, thought))
    assert marked(qwen3, TWO[:2]).endswith("ass istant Ċ *<think> *ĊĊ *</think> *Ċ *Ċ *Hello *Ġyou *! *<|im_end|> *Ċ")


def test_a_template_that_drops_a_turn_is_refused():
    def dropping(role):
        return "{% for m in messages if m.role != '" + role + "' %}{{ m.content + '<|im_end|>' }}{% endfor %}"

    tokenizer, messages = chats.tokenizer("smollm2"), turns("Hi there", "Yes", system="Hi")
    for role, turn in (("system", 2), ("user", 2), ("assistant", 3)):  # "Hi" is in what the user says too
        said = refused(lambda role=role: encoded(tokenizer, messages, dropping(role)))
        assert f"the template my.jinja leaves out or changes turn {turn}, of the role " in said


def test_what_a_template_refuses_is_said_with_file_and_row():
    said = refused(lambda: encoded(chats.tokenizer("gemma"), turns("Hi", "Yes", system="Be short.")))
    wanted = (
        "chats.jsonl, line 3: the tokenizer's chat template does not take this conversation: System role not supported"
    )
    assert said == wanted
    for text in ("{{ messages[0].nothing.at_all }}", "{% if %}", "{{ 1 / 0 }}"):
        said = refused(lambda text=text: encoded(chats.tokenizer("smollm2"), TWO, text))
        assert said.startswith("chats.jsonl, line 3: the template my.jinja does not take this conversation: ")


def test_the_date_of_a_template_is_the_same_every_day():
    tokenizer = chats.tokenizer("llama3_2")
    assert "strftime_now" in tokenizer.chat_template
    assert "Today Date: 26 Jul 2024" in tokenizer.decode(encoded(tokenizer, TWO[:2])[0])


def test_tools_and_calls_are_read_and_calls_are_learnt():
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
    ]
    said = marked(chats.tokenizer("qwen2_5"), messages, tools=tools)
    assert said.count("*<tool_call>") == said.count("*</tool_call>") == 1 and "*Ġis *Ġ *2 *. *<|im_end|>" in said
    assert "< tool _ response > Ċ 2 Ċ </ tool _ response >" in said
    said = refused(lambda: encoded(chats.tokenizer("smollm2"), messages, tools=tools))
    assert "the tokenizer's chat template leaves out the tools" in said
    said = refused(lambda: encoded(chats.tokenizer("smollm2"), messages))
    assert "leaves out or changes turn 2, of the role assistant" in said


def test_a_result_that_is_written_as_json_is_there():
    """Llama 3.2's template writes what a tool returns with quotes, which are escaped inside."""
    call = {"type": "function", "function": {"name": "area", "arguments": {"a": 3}}}
    messages = [*turns("Area?"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    messages += [{"role": "tool", "content": '{"area": "9 m²"}'}, {"role": "assistant", "content": "It is 9 m²."}]
    said = marked(chats.tokenizer("llama3_2"), messages)
    assert said.count("*<|eot_id|>") == 2


def test_a_text_that_spells_the_end_of_a_turn_is_refused():
    for place, turn in ((0, 1), (1, 2)):
        messages = turns("Hi", "Yes")
        messages[place]["content"] = "Say </s> and <|im_end|> now"
        said = refused(lambda messages=messages: encoded(chats.tokenizer("smollm2"), messages))
        assert said == f"chats.jsonl, line 3: turn {turn} holds '<|im_end|>', which ends a turn: remove it"
        assert "holds '</s>'" in refused(lambda messages=messages: encoded(chats.tokenizer("mistral"), messages))
        assert encoded(chats.tokenizer("gemma"), messages)


def test_turns_that_are_not_to_be_learnt_are_read_only():
    said = marked(chats.tokenizer("gemma"), TWO, learnt=[False, False, False, True])
    assert "*Hello" not in said and said.endswith("*2 *<end_of_turn> *Ċ")


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before what it reads, at the start of any text, as Llama 2's does."""
    words = ["<unk>", "<s>", "</s>", "▁", *string.ascii_letters, *"[]/:.!?", "\n", "▁a", "\n\n"]
    tokenizer = Tokenizer(
        models.BPE({word: place for place, word in enumerate(words)}, [("▁", "a"), ("\n", "\n")], unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def test_a_token_on_both_sides_of_a_prompts_end_is_learnt_if_the_text_cannot_be_read_in_pieces():
    text = "{% for m in messages %}{{ m.role + ':\\n' + m.content + eos_token }}{% endfor %}"
    text += "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
    tokenizer = sentencepiece()
    assert "*" not in marked(tokenizer, turns("a", "b"), text).partition("*b")[0]
    assert marked(tokenizer, turns("a", "\nb"), text).partition("*")[2] == "\n\n *b *</s>"


def test_a_tokenizer_without_a_template_gets_chatml_that_ends_with_its_own_end_token():
    tokenizer = chats.tokenizer("smollm2")
    tokenizer.chat_template = None
    assert marked(tokenizer, turns("Hi", "Yes")) == (
        "<|im_start|> user Ċ Hi <|im_end|> Ċ <|im_start|> ass istant Ċ *Yes *<|im_end|> *Ċ"
    )
    plain = sentencepiece()
    ids, [(start, stop)] = encoded(plain, turns("a", "b"))
    assert (
        plain.convert_ids_to_tokens(ids[start:stop]) == ["b", "</s>", "▁", "\n"] and ids.count(plain.eos_token_id) == 2
    )
    plain.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    begun, [answer] = encoded(plain, turns("a", "b"))
    assert begun == [1, *ids] and answer == (start + 1, stop + 1)


def test_all_turns_of_a_long_conversation_are_found():
    texts = [*itertools.chain.from_iterable((f"What is {n}?", f"It is {n}.") for n in range(40))]
    ids, answers = encoded(chats.tokenizer("smollm2"), turns(*texts))
    tokenizer = chats.tokenizer("smollm2")
    assert [tokenizer.decode(ids[start:stop]) for start, stop in answers] == [
        f"It is {n}.<|im_end|>\n" for n in range(40)
    ]
