"""The tokenizer: a byte-level BPE of 1,536 entries trained on the corpus, and the ChatML template with tools.

Knows text. Ignores what the text means. Digits are split singly, so that arithmetic is done on digits. The template
is Qwen3's in form (tool results stand in a user turn as <tool_response>), shorter in its words.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 1536
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MARKERS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEMPLATE = """\
{%- set system = messages[0] if messages and messages[0].role in ['system', 'developer'] else none -%}
{%- if system or tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if system -%}{{- system.content -}}{%- endif -%}
{%- if tools -%}
{{- ('\\n\\n' if system else '') + '# Tools\\n<tools>\\n' -}}
{%- for tool in tools -%}
{%- set function = tool.function if tool.function else tool -%}
{{- {'name': function.name, 'description': function.description, 'parameters': function.parameters} | tojson -}}
{{- '\\n' -}}
{%- endfor -%}
{{- '</tools>\\nCall them as\\n<tool_call>\\n{"name": ..., "arguments": ...}\\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- set content = message.content if message.content else '' -%}
{%- if message.role in ['system', 'developer'] -%}
{%- if not loop.first -%}{{- '<|im_start|>system\\n' + content + '<|im_end|>\\n' -}}{%- endif -%}
{%- elif message.role == 'assistant' -%}
{%- if '</think>' in content -%}{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
{{- '<|im_start|>assistant\\n' + content -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function if call.function else call -%}
{%- if content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": "' + function.name + '", "arguments": ' -}}
{%- set arguments = function.arguments -%}
{{- arguments if arguments is string else arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str], context: int = 2048) -> PreTrainedTokenizerFast:
    """A Hugging Face tokenizer with the chat template, trained on the texts' words (markers left out)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    special = [END_OF_TEXT, TURN_START, TURN_END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKERS),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((_without_markers(text) for text in texts), trainer)
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    if len(tokenizer) != VOCABULARY:
        raise ValueError(f"the tokenizer has {len(tokenizer)} entries, not {VOCABULARY}: give it more varied text")
    return tokenizer


def _without_markers(text: str) -> str:
    for marker in (TURN_START, TURN_END, *MARKERS):
        text = text.replace(marker, "\n")
    return text
