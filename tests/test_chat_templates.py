"""Chat templates that think, use channels, or cannot be used."""

import copy
import itertools
import resource

import pytest
from shard_fixtures import turns

from vllava.batch import IGNORE_INDEX
from vllava.conversation import TEMPLATES, encode, ends_of_turn, template
from vllava.data.build import conversation_packer
from vllava.errors import UserError

ROLE = "<|im_start|>{{ m.role }}\n"
EACH, END = "{% for m in messages %}", "{% endfor %}"
IF_ANSWER = "{% if m.role == 'assistant' %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
THINKING = {
    "an empty thought before the last answer": (
        EACH + ROLE + "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n" + END + PROMPT
    ),
    "a prompt that opens a thought": (
        EACH
        + ROLE
        + IF_ANSWER
        + "<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
        + END
        + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "a channel": (
        EACH
        + "<|im_start|>{{ m.role }}"
        + IF_ANSWER
        + "<|channel|>final{% endif %}<|message|>{{ m.content }}<|im_end|>"
        + END
        + "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    ),
    "an end of its own for the last answer": (
        EACH + ROLE + "{{ m.content }}{{ '</s>' if loop.last else '<|im_end|>' }}\n" + END + PROMPT
    ),
    "texts without the space around them": EACH + ROLE + "{{ m.content | trim }}<|im_end|>\n" + END + PROMPT,
    "a space before the answer": (
        EACH + "{% if m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} </s>"
        "{% endif %}" + END
    ),
    "thoughts cut from answers": (
        EACH
        + ROLE
        + "{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
        + END
        + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "a switch": (
        EACH + ROLE + IF_ANSWER + "{% if enable_thinking is defined and not enable_thinking %}"
        "<think></think>{% endif %}{% endif %}{{ m.content }}<|im_end|>\n" + END + PROMPT
    ),
}


@pytest.fixture(scope="session")
def thinking_tokenizer(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|channel|>", "<|message|>"]}
    )
    changed.add_tokens(["<think>", "</think>"])  # which are not special where they are published
    return changed


@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_what_is_learned_is_the_answer_and_the_prompt_is_what_came_before_it(name, rounds, thinking_tokenizer):
    tokenizer = copy.copy(thinking_tokenizer)
    tokenizer.chat_template = THINKING[name]
    write = template("chat", {"enable_thinking": False})
    conversation = turns(*["<image> Colour?", "red"] * rounds)
    asked, told = encode(conversation[:-1], tokenizer, write), encode(conversation, tokenizer, write)
    learned = [list(run) for is_label, run in itertools.groupby(told.labels, lambda t: t >= 0) if is_label]
    assert [tokenizer.decode(run, skip_special_tokens=True).strip() for run in learned] == ["red"] * rounds
    assert {run[-1] for run in learned} <= set(ends_of_turn(tokenizer, write))
    assert told.token_ids[: len(asked.token_ids)] == asked.token_ids
    assert told.labels[len(asked.token_ids) :][: len(learned[-1])] == learned[-1]
    assert set(asked.labels[told.labels.index(learned[-1][0]) :] if rounds == 1 else []) <= {IGNORE_INDEX}


def test_a_template_that_ends_the_last_answer_otherwise_has_two_ends(thinking_tokenizer):
    tokenizer = copy.copy(thinking_tokenizer)
    tokenizer.chat_template = THINKING["an end of its own for the last answer"]
    ends = ends_of_turn(tokenizer, TEMPLATES["chat"])
    assert sorted(tokenizer.convert_ids_to_tokens(ends)) == ["</s>", "<|im_end|>"]


DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ date_string }}{% for m in messages %}" + ROLE + "{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("options", "begins"),
    [({"date": "2024-07-26"}, "26 Jul 2024"), ({"date_string": "1 Jan 2025"}, "1 Jan 2025")],
)
def test_a_template_that_writes_the_date_needs_one_that_is_fixed(options, begins, thinking_tokenizer):
    tokenizer = copy.copy(thinking_tokenizer)
    tokenizer.chat_template = DATED
    with pytest.raises(UserError, match=r"writes today's date.*data\.template_options\.date=2024-07-26"):
        conversation_packer({}, tokenizer, "chat")
    packer = conversation_packer({}, tokenizer, "chat", template_options=options)
    text = tokenizer.decode(encode(turns("Colour?", "red"), tokenizer, packer.template).token_ids)
    assert text.replace(" ", "").startswith(begins.replace(" ", ""))
    with pytest.raises(UserError, match="not a day"):
        conversation_packer({}, tokenizer, "chat", template_options={"date": "yesterday"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (EACH + "{% for c in m.content %}{{ '' + c.text }}{% endfor %}</s>" + END, "wants the content.*list of parts"),
        (
            EACH + "{% for c in m.content if c.type == 'text' %}{{ c.text }}{% endfor %}</s>" + END,
            r"leaves out question 1\. It wants the content.*list of parts",
        ),
        ("{{ raise_exception('Only for tools') }}", r"refuses this conversation \(Only for tools\)"),
        ("{% for m in messages %}{{ m.content }}", "refuses this conversation"),
        ("{{ messages[0].missing.deeper }}", "refuses this conversation"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses this conversation"),
        (EACH + "{{ m.content * 2 }}</s>" + END, "repeats question 1"),
        (EACH + "{{ m.content | upper }}</s>" + END, "does not write question 1 as it stands"),
        ("{% for m in messages | reverse %}{{ m.content }}</s>" + END, "order of the turns"),
        (EACH + "{{ m.content }}{{ m.content | length }}</s>" + END, "does not write question 1 as it stands"),
    ],
    ids=lambda value: None,
)
def test_a_chat_template_that_cannot_be_used_is_refused_in_words(text, message, thinking_tokenizer):
    tokenizer = copy.copy(thinking_tokenizer)
    tokenizer.chat_template = text
    with pytest.raises(UserError, match=message):
        encode(turns("What colour is it?", "red"), tokenizer, TEMPLATES["chat"])


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**10 }}",
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{{ 'x' * 10**8 }}",
    ],
    ids=["loops", "a text beyond memory", "a text that doubles", "a long text"],
)
def test_a_chat_template_that_does_not_come_to_an_end_is_refused(text, thinking_tokenizer, monkeypatch):
    monkeypatch.setattr("vllava.templates.TEMPLATE_SECONDS", 1)
    tokenizer = copy.copy(thinking_tokenizer)
    tokenizer.chat_template = text
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match="does not come to an end"):
        conversation_packer({}, tokenizer, "chat")
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_system_text_that_the_template_ignores_is_refused(thinking_tokenizer):
    tokenizer = copy.copy(thinking_tokenizer)
    tokenizer.chat_template = EACH + "{% if m.role != 'system' %}{{ m.content }}</s>{% endif %}" + END
    with pytest.raises(UserError, match="leaves out the system text"):
        encode([{"from": "system", "value": "x"}, *turns("a", "b")], tokenizer, TEMPLATES["chat"])


@pytest.mark.parametrize("name", ["vicuna_v1", "llava_v1"])
def test_a_tokenizer_without_an_end_token_is_refused_and_no_answer_ends_in_none(name, tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        encode(turns("Colour?", "red"), changed, TEMPLATES[name])


def test_options_are_for_the_tokenizers_own_template():
    with pytest.raises(UserError, match=r"are for data\.template=chat; vicuna_v1 takes none"):
        template("vicuna_v1", {"enable_thinking": False})
