"""The tokenizer inside a GGUF file, written out as tokenizer.json.

GGUF holds the vocabulary, but only hints about the rest: the name of a split rule, a few flags, the ids of some
marks, and defaults that llama.cpp has built in. An overlooked hint silently changes ids, so an unknown one is
refused. The families supported here use two kinds: byte-level BPE ("gpt2") and sentencepiece ("llama").
"""

import json
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretell.errors import ForetellError, is_number
from foretell.files import one_line
from foretell.loading.gguf_file import GGUFFile
from foretell.loading.tokenizer import ENDS

if TYPE_CHECKING:
    import tokenizers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # token types
_MARKS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}
_SPM_MARKS = {"unk": 0, "bos": 1, "eos": 2}  # a sentencepiece vocabulary that names none has these
_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class SplitRule:
    """Splits text before the merges of a byte-level vocabulary; each pattern splits the pieces of the one before."""

    patterns: tuple[str, ...] = ()
    digits_apart: bool = False  # every digit is a piece of its own
    gpt2: bool = False  # GPT-2's own pattern, built into the library, comes last
    whole_words: bool = False  # a piece that is a token is not merged from parts
    start_mark: bool = False  # text begins with BOS, unless the file says otherwise
    normal_form: bool = False  # accents are composed first (NFC)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BREAKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, others: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*") -> str:
    """The pattern of GPT-4 and of most models since; they differ in the arguments."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{others}|{_BREAKS}"


def _cased_words(digits: str, ending: str) -> str:
    """Words also end where a capital follows a small letter."""
    return (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{ending}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{ending}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BREAKS}"
    )


_GPT2 = SplitRule(gpt2=True)
_DIGITS_APART = SplitRule(digits_apart=True, gpt2=True)
_THREES = SplitRule((_words(r"\p{N}{1,3}"),))
_LLAMA3 = SplitRule(_THREES.patterns, whole_words=True, start_mark=True)
_SINGLES = SplitRule((_words(r"\p{N}"),))
_GPT4O = SplitRule((_cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))

SPLIT_RULES: dict[str, SplitRule] = {  # by tokenizer.ggml.pre
    "qwen2": SplitRule(_SINGLES.patterns, normal_form=True),
    "tekken": SplitRule((_cased_words(r"\p{N}", ""),), whole_words=True, start_mark=True),
    "seed-coder": SplitRule((_words(r"\p{N}", others=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "deepseek-coder": SplitRule((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+"), digits_apart=True),
}
for _rule, _names in (
    (_LLAMA3, "llama-bpe llama3 llama-v3 falcon3 midm-2.0 lfm2"),
    (_THREES, "dbrx smaug-bpe glm4 chatglm-bpe"),
    (_SINGLES, "deepseek-r1-qwen kormo megrez stablelm2 hunyuan solar-open"),
    (_GPT4O, "gpt-4o llama4 kanana2 minimax-m2"),
    (_DIGITS_APART, "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (_GPT2, "gpt-2 phi-2 mpt olmo trillion granite-docling gigachat a.x-4.0 mellum exaone4"),
):
    SPLIT_RULES |= dict.fromkeys(_names.split(), _rule)


def write_tokenizer(file: GGUFFile, folder: Path) -> None:
    """Writes tokenizer.json, its settings and the chat template."""
    tokens, ids = _tokens(file), marks(file)
    kind = file.get("tokenizer.ggml.model")
    if kind == "gpt2":
        rule = _split_rule(file)
        backend, start_mark = _byte_level(file, tokens, rule), rule.start_mark
    elif kind == "llama":
        backend, start_mark = _sentencepiece(file, tokens), True
    else:
        raise ForetellError(
            f"{file.path} has a tokenizer of the kind {reprlib.repr(kind)}; the kinds are 'gpt2' and 'llama', "
            "so use the original safetensors checkpoint."
        )
    _add_special_tokens(backend, file, tokens, ids)
    _add_marks(backend, file, tokens, ids, start_mark)
    backend.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.get(f"{file.get('general.architecture')}.context_length"),
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[ids[name]] for name in ("bos", "eos", "unk", "pad") if name in ids},
    }
    if template := file.text("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    elif named := file.strings("tokenizer.chat_templates"):
        settings["chat_template"] = [
            {"name": name, "template": file.text(f"tokenizer.chat_template.{name}") or ""} for name in named
        ]
    content = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")


def splitter(rule: SplitRule) -> "tokenizers.pre_tokenizers.PreTokenizer":
    """Builds the library's pre-tokenizer of a rule; it also spells bytes as letters."""
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    if rule.digits_apart:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule.gpt2)
    return pre_tokenizers.Sequence([*steps, letters])


def marks(file: GGUFFile) -> dict[str, int]:
    """Returns the ids of the marks that the file names: bos, eos, eot, eom, unk and pad."""
    count = len(_tokens(file))
    defaults: Mapping[str, int] = _SPM_MARKS if file.get("tokenizer.ggml.model") == "llama" else {}
    found: dict[str, int] = {}
    for name, key in _MARKS.items():
        token = file.get(f"tokenizer.ggml.{key}_token_id", defaults.get(name))
        if token is None:
            continue
        if not is_number(token, whole=True) or not 0 <= token < count:
            raise ForetellError(
                f"{file.path} has tokenizer.ggml.{key}_token_id = {reprlib.repr(token)}, but its tokens are 0 to "
                f"{count - 1}; use the original safetensors checkpoint."
            )
        found[name] = token
    return found


def _tokens(file: GGUFFile) -> list[str]:
    tokens = file.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise ForetellError(f"{file.path} has no tokens (tokenizer.ggml.tokens); use the original checkpoint.")
    if len(set(tokens)) < len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise ForetellError(
            f"{file.path} has the token {reprlib.repr(twice)} twice, so text has no one spelling in ids; "
            "use the original safetensors checkpoint."
        )
    return tokens


def _types(file: GGUFFile, tokens: list[str]) -> list[int]:
    types = file.numbers("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise ForetellError(
            f"{file.path} has {len(types)} token types for {len(tokens)} tokens; fetch it again, or use the original "
            "safetensors checkpoint."
        )
    return types


def _vocabulary(file: GGUFFile, tokens: list[str]) -> dict[str, int]:
    """Maps tokens to ids, without the padding that converters append up to the length of the embedding."""
    return {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, _types(file, tokens), strict=True))
        if not (kind == UNUSED and token == f"[PAD{index}]")
    }


def _split_rule(file: GGUFFile) -> SplitRule:
    name = file.text("tokenizer.ggml.pre")
    if name is None or name == "default":
        raise ForetellError(
            f"{file.path} does not say how its tokenizer splits text (tokenizer.ggml.pre is {name or 'missing'}), and "
            "a wrong split changes the ids; fetch a newer conversion, or use the original safetensors checkpoint."
        )
    if name not in SPLIT_RULES:
        raise ForetellError(
            f"{file.path} splits text by the rule {reprlib.repr(name)} (tokenizer.ggml.pre), which is not known here, "
            "and a wrong split changes the ids; use the original safetensors checkpoint."
        )
    return SPLIT_RULES[name]


def _byte_level(file: GGUFFile, tokens: list[str], rule: SplitRule) -> "tokenizers.Tokenizer":
    from tokenizers import decoders, normalizers

    merges = file.strings("tokenizer.ggml.merges")
    if not merges and file.get("tokenizer.ggml.merges") is None:
        raise ForetellError(f"{file.path} has no merges (tokenizer.ggml.merges); use the original checkpoint.")
    cuts = [merge.find(" ", 1) for merge in merges]
    if -1 in cuts:
        odd = reprlib.repr(merges[cuts.index(-1)])
        raise ForetellError(
            f"{file.path} has {odd} among its merges (tokenizer.ggml.merges), which is not two tokens and a space "
            "between them; use the original safetensors checkpoint."
        )
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]
    backend = _bpe(file, _vocabulary(file, tokens), pairs, ignore_merges=rule.whole_words)
    if rule.normal_form:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = splitter(rule)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str]) -> "tokenizers.Tokenizer":
    """Builds a sentencepiece tokenizer: a space is a letter, and each stretch of text between marks begins with one."""
    from tokenizers import decoders, normalizers

    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if file.get(f"tokenizer.ggml.{key}"):
            raise ForetellError(
                f"{file.path} has tokenizer.ggml.{key}, which is not supported for this kind of tokenizer; "
                "use the original safetensors checkpoint."
            )
    vocabulary = _vocabulary(file, tokens)
    unknown = tokens[marks(file)["unk"]]
    merges = _merges(file, tokens, vocabulary)
    backend = _bpe(file, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    spaces: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _bpe(
    file: GGUFFile, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(vocabulary, merges, **options))
    except Exception as error:  # the library raises bare Exceptions, such as for a merge that is no token
        raise ForetellError(
            f"The tokenizer inside {file.path} cannot be read ({one_line(error)}); "
            "use the original safetensors checkpoint."
        ) from error


def _merges(file: GGUFFile, tokens: list[str], vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Turns scores into merges: sentencepiece joins the pair whose token scores best, so pairs come best first."""
    scores = file.numbers("tokenizer.ggml.scores")
    ordinary = [i for i, kind in enumerate(_types(file, tokens)) if kind == NORMAL and tokens[i] in vocabulary]
    if len(scores) != len(tokens) or len({scores[i] for i in ordinary}) < 2:
        raise ForetellError(
            f"{file.path} has no scores of its tokens (tokenizer.ggml.scores), so nothing says how text becomes "
            "tokens; use the original safetensors checkpoint."
        )
    ordinary.sort(key=lambda i: -scores[i])
    lengths = set(map(len, vocabulary))  # a token as long as a book is not copied once for each of its letters
    merges: list[tuple[str, str]] = []
    for token in (tokens[i] for i in ordinary):
        cuts = [cut for cut in range(1, len(token)) if cut in lengths and len(token) - cut in lengths]
        pairs = [(token[:cut], token[cut:]) for cut in cuts]
        pairs = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += sorted(pairs, key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
    return merges


def _add_special_tokens(
    backend: "tokenizers.Tokenizer", file: GGUFFile, tokens: list[str], ids: Mapping[str, int]
) -> None:
    """Adds the tokens that are found in text before it is split; the marks among them are special."""
    from tokenizers import AddedToken

    kinds = _types(file, tokens)
    marked = {tokens[token] for token in ids.values()} | ENDS
    special = [token in marked or kind in (UNKNOWN, CONTROL) for token, kind in zip(tokens, kinds, strict=True)]
    backend.add_special_tokens(
        [AddedToken(token, normalized=False) for token, mark in zip(tokens, special, strict=True) if mark]
    )
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, mark, kind in zip(tokens, special, kinds, strict=True)
            if kind == USER_DEFINED and not mark
        ]
    )


def _add_marks(
    backend: "tokenizers.Tokenizer", file: GGUFFile, tokens: list[str], ids: Mapping[str, int], start_mark: bool
) -> None:
    """Sets the marks around a bare text, as a template of the library."""
    from tokenizers import processors

    around = {"bos": file.get("tokenizer.ggml.add_bos_token", start_mark and "bos" in ids)}
    around["eos"] = file.get("tokenizer.ggml.add_eos_token", False)
    wanted = [name for name, add in around.items() if add]
    if missing := [name for name in wanted if name not in ids]:
        raise ForetellError(
            f"{file.path} asks for a {missing[0]} token around every text but names none "
            f"(tokenizer.ggml.{missing[0]}_token_id); use the original safetensors checkpoint."
        )
    single = [tokens[ids["bos"]] if around["bos"] else None, "$A", tokens[ids["eos"]] if around["eos"] else None]
    backend.post_processor = processors.TemplateProcessing(
        single=[piece for piece in single if piece],
        special_tokens=[(tokens[ids[name]], ids[name]) for name in dict.fromkeys(wanted)],
    )
