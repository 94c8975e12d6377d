"""`teachers/alignment.py`: text chunks that the tokens of two tokenizers tile, and the padding of their columns."""

from __future__ import annotations

import random
import time
import unicodedata
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, default_data_collator

from kd_trainer import TeacherCollator, align_teacher_tokens

WORDS = "the cat sat on a mat while two quick brown dogs jumped over seven lazy foxes".split()  # noqa: SIM905
OTHERS = ["naïve", "café", "東京", "日本語", "👍", "👩\u200d👩\u200d👧"]
RANDOM = random.Random(0)
TEXTS = [" ".join(RANDOM.choices(WORDS + OTHERS, k=RANDOM.randint(1, 9))) for _ in range(60)]
# Letters, white space, combining marks, CJK, emoji with joiners and skin colours, right to left, a ligature, controls.
LETTERS = [
    *"abcde  ZÉé.,\n\t'",
    "e\u0301",
    "n\u0303o",
    "東",
    "京",
    "あ",
    "👍",
    "👍🏽",
    "👩\u200d👧",
    "שלום",
    "ﬁ",
    "\u0000",
]


def byte_level(size: int, texts: list[str], trim: bool, **names: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    options = {"special_tokens": ["<pad>", "<end>"], "initial_alphabet": ByteLevel.alphabet(), "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, **options))
    if trim:  # the offsets of most published byte-level tokenizers leave white space out
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", **names)


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    template = {"single": "[CLS] $A [SEP]", "special_tokens": [("[CLS]", 2), ("[SEP]", 3)]}
    tokenizer.post_processor = processors.TemplateProcessing(**template)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]", bos_token="[CLS]"
    )


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    options = {"unk_token": "<unk>", "special_tokens": ["<pad>", "<unk>", "<s>", "</s>"], "show_progress": False}
    tokenizer.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=90, **options))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


SMALL, LARGE = byte_level(270, TEXTS[:30], trim=False), byte_level(340, TEXTS[30:], trim=True)
WORD_PIECE, UNIGRAM = wordpiece(), unigram()


def aligned(texts: list[Any], student: Any = SMALL, teacher: Any = LARGE, **options: Any) -> list[dict[str, Any]]:
    data = Dataset.from_dict({"text": texts} | options.pop("columns", {}))
    return list(align_teacher_tokens(data, "text", tokenizer=student, teacher_tokenizer=teacher, **options))


def pieces(tokenizer: Any, ids: list[int], chunk_ids: list[int]) -> list[str]:
    """The text of each chunk, in the tokenizer's own letters."""
    found = [""] * (max(chunk_ids, default=-1) + 1)
    for token, chunk in zip(tokenizer.convert_ids_to_tokens(ids), chunk_ids, strict=True):
        if chunk >= 0:
            found[chunk] += token
    return found


def boundaries(tokenizer: Any, text: str) -> set[int]:
    """By the definition: where a token ends and all later ones begin there or behind; not before a combining mark."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return {end for i, (_, end) in enumerate(offsets)
            if all(e <= end for _, e in offsets[:i]) and all(s >= end for s, _ in offsets[i + 1 :])
            and not unicodedata.category(text[end : end + 1] or " ").startswith("M")}  # fmt: skip


def test_random_strings_are_tiled_exactly_by_both_sides():
    texts = ["".join(RANDOM.choices(LETTERS, k=RANDOM.randint(0, 25))) for _ in range(1000)]
    untrimmed = byte_level(340, TEXTS[30:], trim=False)
    for text, row in zip(texts, aligned(texts, SMALL, untrimmed), strict=True):
        assert row["input_ids"] == SMALL(text)["input_ids"]
        assert row["teacher_input_ids"] == untrimmed(text)["input_ids"]
        both = [row["chunk_ids"], row["teacher_chunk_ids"]]
        for ids in both:  # every token is in a chunk, and no chunk is left out
            assert ids == sorted(ids)
            assert sorted(set(ids)) == list(range(len(set(ids))))
        student = pieces(SMALL, row["input_ids"], both[0])
        assert student == pieces(untrimmed, row["teacher_input_ids"], both[1])  # byte for byte
        assert len(student) == len((boundaries(SMALL, text) & boundaries(untrimmed, text)) | {len(text)} - {0})


def same_text(
    tokenizer: Any, row: dict[str, Any], text: str, prefix: str
) -> tuple[list[set[int]], dict[int, set[int]]]:
    """The letters of `text`, but for white space and what combines, of each chunk; and the chunks of each letter."""
    offsets, ids = tokenizer(text, return_offsets_mapping=True)["offset_mapping"], row[prefix + "chunk_ids"]
    of_chunk: list[set[int]] = [set() for _ in range(max(ids, default=-1) + 1)]
    of_letter: dict[int, set[int]] = {}
    assert [i for i in ids if i >= 0] == sorted(i for i in ids if i >= 0)
    for chunk, (start, end) in zip(ids, offsets, strict=True):
        for place in range(start, end):
            if not text[place].isspace() and not unicodedata.category(text[place]).startswith("M"):
                of_letter.setdefault(place, set()).add(chunk)
                if chunk >= 0:
                    of_chunk[chunk].add(place)
    return of_chunk, of_letter


def of_sentence_pieces() -> PreTrainedTokenizerFast:
    """As Llama 2: a space in front, bytes for letters that have no token."""
    tokenizer = Tokenizer(models.BPE({"<pad>": 0, "<end>": 1, "▁": 2} | {f"<0x{i:02X}>": i + 3 for i in range(256)}
                                     | {letter: 259 + i for i, letter in enumerate("abcdetho")}
                                     | {"▁t": 270, "th": 271, "▁a": 272}, [("▁", "t"), ("t", "h"), ("▁", "a")],
                                     byte_fallback=True))  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def with_normalizer(normalizer: Any, *, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(SMALL.backend_tokenizer.to_str())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, ByteLevel(add_prefix_space=prefix_space)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


CHANGING = {
    "prefix space": with_normalizer(normalizers.Sequence([]), prefix_space=True),
    "lowercase": with_normalizer(normalizers.Lowercase()),
    "NFKC": with_normalizer(normalizers.NFKC()),
    "no accents": with_normalizer(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "byte fallback": of_sentence_pieces(),
    "word pieces": WORD_PIECE,
    "unigram": UNIGRAM,
}


@pytest.mark.parametrize("name", CHANGING)
def test_tokenizers_that_change_the_text_are_aligned_letter_by_letter(name):
    """A letter of a chunk on one side is in no other chunk of the other side; without unknown tokens all are in one."""
    other, letters = CHANGING[name], [*LETTERS, "½", "İ", "ﷺ", "\u3000", "  "]
    texts = ["".join(RANDOM.choices(letters, k=RANDOM.randint(0, 25))) for _ in range(60)]
    for text, row in zip(texts, aligned(texts, LARGE, other), strict=True):
        sides = [same_text(tokenizer, row, text, prefix) for tokenizer, prefix in ((LARGE, ""), (other, "teacher_"))]
        assert len(sides[0][0]) == len(sides[1][0])
        for (chunks, _), (_, of_letter) in (sides, sides[::-1]):
            for number, places in enumerate(chunks):
                assert all(of_letter.get(place, {number}) == {number} for place in places), text
        if other.unk_token is None and text.strip():
            assert -1 not in row["chunk_ids"] + row["teacher_chunk_ids"], text


PAIRS = [(SMALL, LARGE), (WORD_PIECE, SMALL), (LARGE, UNIGRAM), (UNIGRAM, WORD_PIECE)]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_tokenizers_of_other_kinds_tile_the_same_words(student, teacher):
    texts = [" ".join(RANDOM.choices(WORDS, k=RANDOM.randint(1, 12))) for _ in range(100)]
    for text, row in zip(texts, aligned(texts, student, teacher), strict=True):
        chunks = []
        for prefix, tokenizer in (("", student), ("teacher_", teacher)):
            encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
            ids = row[prefix + "chunk_ids"]
            special = encoded["special_tokens_mask"]
            assert [i < 0 for i in ids] == [m == 1 for m in special]
            spans: dict[int, list[int]] = {}
            for chunk, (start, end) in zip(ids, encoded["offset_mapping"], strict=True):
                if chunk >= 0:
                    spans[chunk] = [min(start, spans.get(chunk, [start])[0]), end]
            chunks.append([text[start:end].strip() for start, end in spans.values()])
        assert chunks[0] == chunks[1]
        assert "".join(chunks[0]) == text.replace(" ", "")
        assert len(chunks[0]) >= len(text.split())


def test_an_emoji_and_a_combining_mark_are_one_chunk():
    (row,) = aligned(["a👍🏽e\u0301b"])
    for prefix, tokenizer in (("", SMALL), ("teacher_", LARGE)):
        offsets = tokenizer("a👍🏽e\u0301b", return_offsets_mapping=True)["offset_mapping"]
        for chunk in set(row[prefix + "chunk_ids"]):
            inside = {place for place, c in zip(offsets, row[prefix + "chunk_ids"], strict=True) if c == chunk}
            outside = {place for place, c in zip(offsets, row[prefix + "chunk_ids"], strict=True) if c != chunk}
            assert not inside & outside  # tokens of one letter are never parted
    composed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(SMALL.backend_tokenizer.to_str()), pad_token="<pad>"
    )
    composed.backend_tokenizer.normalizer = normalizers.NFKC()
    # Several letters and tokens here, one letter there: e and a mark, katakana and Hangul in two parts.
    for parts, letter in (("e\u0301", "é"), ("\uff76\uff9e", "ガ"), ("\u3131\u314f", "가"), ("\u1100\u1161", "가")):
        (row,) = aligned([f"x{parts}y"], SMALL, composed)
        for text, tokenizer, prefix in ((parts, SMALL, ""), (letter, composed, "teacher_")):
            found = pieces(tokenizer, row[prefix + "input_ids"], row[prefix + "chunk_ids"])
            assert found == ["x", "".join(tokenizer.tokenize(text)), "y"]


def test_truncation_leaves_out_what_has_no_counterpart():
    text = "the quick brown dogs sat on a mat"
    (whole,), (cut,) = aligned([text]), aligned([text], max_length=9)
    assert len(cut["input_ids"]) == len(cut["teacher_input_ids"]) == len(cut["attention_mask"]) == 9
    last = min(max(cut["chunk_ids"]), max(cut["teacher_chunk_ids"]))
    assert last > 1
    for prefix in ("", "teacher_"):
        ids = [i if i <= last else -1 for i in whole[prefix + "chunk_ids"]][:9]
        assert cut[prefix + "chunk_ids"] == ids
        assert whole[prefix + "chunk_ids"].count(last) == ids.count(last)  # none is cut in two
    assert -1 in cut["chunk_ids"] + cut["teacher_chunk_ids"]


def test_end_of_text_is_a_chunk_where_both_have_it():
    (row,) = aligned(["the cat"], append_eos=True)
    assert [row["input_ids"][-1], row["teacher_input_ids"][-1]] == [SMALL.eos_token_id, LARGE.eos_token_id]
    assert row["chunk_ids"][-1] == row["teacher_chunk_ids"][-1] == max(row["chunk_ids"])
    assert row["chunk_ids"].count(row["chunk_ids"][-1]) == 1
    (row,) = aligned(["the cat"], WORD_PIECE, SMALL, append_eos=True)  # WordPiece writes its own
    assert row["input_ids"] == WORD_PIECE("the cat")["input_ids"]
    assert row["chunk_ids"][0] == -1
    assert row["chunk_ids"][-1] == row["teacher_chunk_ids"][-1] == max(row["chunk_ids"])
    (row,) = aligned(["the cat"], WORD_PIECE, SMALL)  # one side alone
    assert row["chunk_ids"][-1] == -1
    (row,) = aligned(["the cat sat"], append_eos=True, max_length=2)
    assert SMALL.eos_token_id not in row["input_ids"]


def test_unknown_and_empty_texts():
    rows = aligned(["", "   ", "the cat ŷ sat"], WORD_PIECE, SMALL)
    assert rows[0]["teacher_input_ids"] == []
    assert set(rows[0]["chunk_ids"] + rows[1]["chunk_ids"] + rows[1]["teacher_chunk_ids"]) == {-1}
    row = rows[2]
    unknown = row["input_ids"].index(WORD_PIECE.unk_token_id)
    assert row["chunk_ids"][unknown] == -1  # its likelihood is not that of the text
    covered = "".join(pieces(SMALL, row["teacher_input_ids"], row["teacher_chunk_ids"])).replace("Ġ", "")
    assert covered == "thecatsat"
    assert max(row["chunk_ids"]) == max(row["teacher_chunk_ids"]) == len(set(row["chunk_ids"])) - 2


def test_masked_labels_are_masked_on_both_sides():
    text = "the cat sat on a mat"
    ids = SMALL(text)["input_ids"]
    labels = [-100] * 4 + ids[4:]
    (row,) = aligned([text], label_column="labels", columns={"labels": [labels]})
    (whole,) = aligned([text])
    masked = {whole["chunk_ids"][i] for i in range(4)}
    assert row["labels"] == labels
    for prefix in ("", "teacher_"):
        expected = [-1 if i in masked else i - len(masked) for i in whole[prefix + "chunk_ids"]]
        assert row[prefix + "chunk_ids"] == expected
    with pytest.raises(ValueError, match=r"label_column` is 3 labels in row 0; expected \d+, one for each token"):
        aligned([text], label_column="labels", columns={"labels": [[1, 2, 3]]})


# ---- chats ----------------------------------------------------------------------------------------------------------

MARKED = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<end>\n{% endfor %}"
STRIPPED = "Chat:{% for m in messages %} [{{ m.role }}] {{ m.content | trim }} {{ eos_token }}{% endfor %} over"


def chat_pair(student: str = MARKED, teacher: str = STRIPPED) -> tuple[Any, Any]:
    return (
        byte_level(270, TEXTS[:30], trim=False, chat_template=student),
        byte_level(340, TEXTS[30:], trim=True, chat_template=teacher),
    )


def test_contents_of_messages_are_aligned_and_templates_are_not():
    student, teacher = chat_pair()
    chat = [
        {"role": "user", "content": "user "},  # as the templates write it, a space behind it too
        {"role": "assistant", "content": " two dogs\n👍 "},
        {"role": "user", "content": ""},
        {"role": "assistant", "content": "a mat"},
    ]
    (row,) = aligned([chat], student, teacher)
    for prefix, tokenizer in (("", student), ("teacher_", teacher)):
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert row[prefix + "input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    both = []
    for prefix, tokenizer in (("", student), ("teacher_", teacher)):
        found = pieces(tokenizer, row[prefix + "input_ids"], row[prefix + "chunk_ids"])
        both.append([piece.replace("Ġ", "").replace("Ċ", "") for piece in found])
    assert both[0] == both[1]
    text = "".join(both[0])
    assert text.count("<end>") == 4
    spans = "".join(text.split("<end>"))
    assert "amat" in spans
    assert "assistant" not in spans
    assert spans.count("user") <= 1


def test_a_token_across_the_start_of_a_content_is_no_part_of_it():
    """The teacher's template has a space in front, which its tokens join with the content's first word."""
    student, _ = chat_pair("{% for m in messages %}|{{ m.content }}{% endfor %}")
    teacher = byte_level(340, TEXTS, trim=False, chat_template="{% for m in messages %}: {{ m.content }}{% endfor %}")
    chat = [{"role": "user", "content": "the cat sat"}]
    assert "Ġthe" in teacher.tokenize(": the cat sat")
    (row,) = aligned([chat], student, teacher)
    both = [
        "".join(pieces(tokenizer, row[prefix + "input_ids"], row[prefix + "chunk_ids"]))
        for prefix, tokenizer in (("", student), ("teacher_", teacher))
    ]
    assert both[0] == both[1] == "ĠcatĠsat"


def test_chats_that_cannot_be_aligned_are_refused():
    chat = [[{"role": "user", "content": "the cat"}]]
    with pytest.raises(ValueError, match="`tokenizer` is a tokenizer without chat_template; expected"):
        aligned(chat)
    student, shouting = chat_pair(teacher="{{ messages[0].content | upper }}")
    with pytest.raises(ValueError, match="`teacher_tokenizer` is a tokenizer whose template changes 'the cat'"):
        aligned(chat, student, shouting)
    with pytest.raises(ValueError, match="`text_column` is a message whose content is no text"):
        aligned([[{"role": "user", "content": [{"type": "image"}]}]], *chat_pair())
    with pytest.raises(ValueError, match="`text_column` is None; expected texts in all rows"):
        aligned(["the cat", None])


# ---- the dataset and the collator -----------------------------------------------------------------------------------


def test_splits_streams_and_the_cache_of_map(tmp_path):
    Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path)
    data = Dataset.load_from_disk(tmp_path)
    both = {"tokenizer": SMALL, "teacher_tokenizer": LARGE}
    first = align_teacher_tokens(data, "text", **both, remove_columns=["text"])
    names = ["input_ids", "attention_mask", "chunk_ids"]
    assert first.column_names == [*names, *("teacher_" + name for name in names)]
    again = align_teacher_tokens(Dataset.load_from_disk(tmp_path), "text", **both, remove_columns=["text"])
    assert again._fingerprint == first._fingerprint
    assert again.cache_files == first.cache_files
    splits = align_teacher_tokens(DatasetDict(train=data, test=data), "text", **both)
    stream = align_teacher_tokens(data.to_iterable_dataset(), "text", **both, batch_size=7)
    for one, two, three in zip(first, splits["test"], stream, strict=True):
        assert {k: list(v) for k, v in three.items() if k != "text"} == one
        assert {k: v for k, v in two.items() if k != "text"} == one


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="`text_column` is 'texts'; expected a column of dataset"):
        align_teacher_tokens(Dataset.from_dict({"text": TEXTS}), "texts", tokenizer=SMALL, teacher_tokenizer=LARGE)
    with pytest.raises(TypeError, match="`dataset` is of type list; expected a dataset of the datasets library"):
        align_teacher_tokens(TEXTS, "text", tokenizer=SMALL, teacher_tokenizer=LARGE)

    class Slow:
        is_fast = False

    for name in ("tokenizer", "teacher_tokenizer"):
        both = {"tokenizer": SMALL, "teacher_tokenizer": LARGE} | {name: Slow()}
        with pytest.raises(ValueError, match=f"`{name}` is a slow Slow; expected a fast tokenizer, because only these"):
            align_teacher_tokens(Dataset.from_dict({"text": TEXTS}), "text", **both)
    with pytest.raises(ValueError, match="`max_length` is 0; expected a finite number >= 1"):
        aligned(TEXTS, max_length=0)


@pytest.mark.parametrize("sides", [("right", "right"), ("left", "left"), ("left", "right")])
@pytest.mark.parametrize("multiple", [None, 8])
def test_chunk_ids_are_padded_beside_their_tokens(sides, multiple):
    student, teacher = (
        byte_level(size, TEXTS, trim=False, padding_side=side) for size, side in zip((270, 340), sides, strict=True)
    )
    rows = aligned(TEXTS[:5], student, teacher, remove_columns=["text"], append_eos=True)
    base = DataCollatorForLanguageModeling(student, mlm=False)
    batch = TeacherCollator(base, teacher, pad_to_multiple_of=multiple)([dict(row) for row in rows])
    assert batch["labels"].shape == batch["chunk_ids"].shape == batch["input_ids"].shape
    assert batch["teacher_chunk_ids"].shape == batch["teacher_input_ids"].shape
    for prefix in ("", "teacher_"):
        mask = batch[prefix + "attention_mask"].bool()
        assert (batch[prefix + "chunk_ids"][~mask] == -1).all()
        for row, ids, real in zip(rows, batch[prefix + "chunk_ids"], mask, strict=True):
            assert ids[real].tolist() == row[prefix + "chunk_ids"]


def test_collators_that_pack_or_cut_are_refused():
    rows = aligned(TEXTS[:4], remove_columns=["text"])
    for change in (lambda batch: {"input_ids": batch["input_ids"].reshape(1, -1)},
                   lambda batch: {"input_ids": batch["input_ids"][:, :2]}):  # fmt: skip
        same = [{k: v[:3] for k, v in row.items()} for row in rows if len(row["input_ids"]) >= 3]
        collator = TeacherCollator(lambda rows, change=change: change(default_data_collator(rows)), LARGE)
        with pytest.raises(ValueError, match="`base_collator` is making input_ids of shape"):
            collator(same)


@pytest.mark.trains  # measures time
def test_alignment_takes_at_most_half_a_millisecond_for_1000_tokens():
    from kd_trainer.teachers.alignment import Segment, Tokens, align

    texts = [" ".join(RANDOM.choices(WORDS + OTHERS, k=40)) for _ in range(400)]
    options = {"return_offsets_mapping": True, "return_special_tokens_mask": True}
    encoded = [tokenizer(texts, **options) for tokenizer in (SMALL, LARGE)]
    segments = [[Segment(0, len(text), 0, len(text))] for text in texts]
    tokens = sum(map(len, encoded[0]["input_ids"]))

    def seconds() -> float:
        start = time.process_time()
        align(*(Tokens.of(texts, e["input_ids"], e["offset_mapping"], e["special_tokens_mask"], segments, None, None)
                for e in encoded))  # fmt: skip
        return time.process_time() - start

    assert min(seconds() for _ in range(7)) / tokens * 1000 < 0.5e-3
