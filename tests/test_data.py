"""What becomes of a good .pt file, and the sentence that each kind of bad one is refused with."""

import itertools
import os
import pickle
import random
import re
import zipfile
from types import SimpleNamespace

import pytest
import torch

from blockwise.cli import InputError
from blockwise.data import make_samples, read_pt

PAD, MASK, WORDS, MAX_LEN = 2, 4, 30, 8
CONFIG = SimpleNamespace(pad_token_id=PAD, vocab_size=WORDS)


def sample(prompt_len, *ids):
    return {"prompt_len": prompt_len, "full_ids": torch.tensor(ids, dtype=torch.long)}


def good_samples():
    return [sample(1, 5, 6, 7), sample(2, 8, 9, 10, 11), sample(0, 12, 13)]


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "the samples ö.pt")  # spaces and other letters must not matter


def load(path, max_samples=0, eos_tail=False):
    knobs = {"DATA_PT": path, "MAX_LEN": MAX_LEN, "MAX_SAMPLES": max_samples, "MASK_ID": MASK, "EOS_TAIL": eos_tail}
    return make_samples(read_pt(path), SimpleNamespace(**knobs), CONFIG)


def load_saved(path, data, max_samples=0):
    torch.save(data, path)
    return load(path, max_samples)


def refusal(path, *parts):
    """The message with which the file is refused, which must name it."""
    with pytest.raises(InputError) as error:
        load(path)
    message = str(error.value)
    assert path in message
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


# ---------------------------------------------------------------- good files


def test_with_an_eos_tail_every_answer_ends_at_max_len(path):
    plain = load_saved(path, [*good_samples(), sample(2, 5, 6)])  # the last has no answer: a tail alone is none
    tail = load(path, eos_tail=True)
    assert tail.length.tolist() == [MAX_LEN] * 3 and tail.prompt_len.equal(plain.prompt_len)
    assert tail.ids.equal(plain.ids) and tail.unanswered == 1


def test_samples_are_padded_to_max_len(path):
    samples = load_saved(path, good_samples())
    assert samples.ids.tolist() == [
        [5, 6, 7, PAD, PAD, PAD, PAD, PAD],
        [8, 9, 10, 11, PAD, PAD, PAD, PAD],
        [12, 13, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert samples.ids.dtype == torch.int32
    assert samples.prompt_len.tolist() == [1, 2, 0]
    assert samples.length.tolist() == [3, 4, 2]
    assert samples.unanswered == 0


def test_a_sample_of_exactly_max_len(path):
    samples = load_saved(path, [sample(3, *range(5, 5 + MAX_LEN)), sample(1, 5, 6)])
    assert samples.ids[0].tolist() == list(range(5, 5 + MAX_LEN))
    assert samples.length.tolist() == [MAX_LEN, 2]


def test_highest_id_and_pad_id_inside_a_sample(path):
    """LLaDA pads with its end-of-text token, which samples may contain: the length, not the id, says where they end."""
    samples = load_saved(path, [sample(1, PAD, 0, WORDS - 1, PAD)])
    assert samples.ids[0, :4].tolist() == [PAD, 0, WORDS - 1, PAD]
    assert samples.length.tolist() == [4]


def test_samples_without_an_answer_are_left_out_and_counted(path):
    samples = load_saved(path, [sample(2, 5, 6), *good_samples(), sample(0), sample(3, 5, 6, 7)])
    assert samples.ids[:, 0].tolist() == [5, 8, 12]
    assert samples.prompt_len.tolist() == [1, 2, 0]
    assert samples.length.tolist() == [3, 4, 2]
    assert samples.unanswered == 3


@pytest.mark.parametrize(
    "max_samples, expected", [(0, [5, 8, 12]), (1, [5]), (2, [5, 8]), (3, [5, 8, 12]), (9, [5, 8, 12])]
)
def test_max_samples_takes_the_first_usable_samples(path, max_samples, expected):
    """A sample without an answer does not use up a place."""
    first, *others = good_samples()
    samples = load_saved(path, [sample(2, 5, 6), first, sample(1, 6), *others], max_samples)
    assert samples.ids[:, 0].tolist() == expected
    assert len(samples.prompt_len) == len(samples.length) == len(expected)
    assert samples.unanswered == 2  # of the whole file


def test_keys_that_are_not_needed_do_not_matter(path):
    assert len(load_saved(path, [item | {"type": "GSM"} for item in good_samples()]).length) == 3


# ---------------------------------------------------------------- bad samples


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize(
    "bad, part",
    [
        ([1, 2], "prompt_len and full_ids"),
        (None, "prompt_len and full_ids"),
        (torch.tensor([5, 6]), "prompt_len and full_ids"),
        ({}, "prompt_len and full_ids"),
        ({"prompt_len": 1}, "prompt_len and full_ids"),
        ({"full_ids": torch.tensor([5, 6])}, "prompt_len and full_ids"),
        ({"prompt_len": 1, "full_ids": [5, 6]}, "1-D LongTensor"),
        ({"prompt_len": 1, "full_ids": torch.tensor([5, 6], dtype=torch.int32)}, "1-D LongTensor"),
        ({"prompt_len": 1, "full_ids": torch.tensor([5.0, 6.0])}, "1-D LongTensor"),
        ({"prompt_len": 1, "full_ids": torch.tensor([[5, 6]])}, "1-D LongTensor"),
        ({"prompt_len": 1, "full_ids": torch.tensor(5)}, "1-D LongTensor"),
        (sample(-1, 5, 6), "prompt_len -1"),
        (sample(3, 5, 6), "prompt_len 3"),
        (sample(1.0, 5, 6), "prompt_len 1.0"),
        (sample(True, 5, 6), "prompt_len True"),
        (sample(torch.tensor(1), 5, 6), "prompt_len"),
        (sample(None, 5, 6), "prompt_len None"),
        (sample(2, *range(5, 6 + MAX_LEN)), f"9 tokens, more than MAX_LEN={MAX_LEN}"),
        (sample(1, 5, WORDS), f"id {WORDS}, outside the model's vocabulary of {WORDS}"),
        (sample(1, 5, 2**40), f"id {2**40}, outside"),  # would be 0 as int32
        (sample(1, -1, 5), "id -1, outside"),
        (sample(1, 5, MASK), f"id {MASK}, which is MASK_ID"),
        (sample(1, MASK, 5), f"id {MASK}, which is MASK_ID"),
        (sample(2, 5, MASK), f"id {MASK}, which is MASK_ID"),  # also where the sample has no answer
    ],
)
def test_bad_sample(path, bad, part, place):
    data = good_samples()
    data.insert(place, bad)
    torch.save(data, path)
    message = refusal(path, part)
    assert re.search(rf"\bsample {place}\b", message)


def test_bad_sample_after_max_samples(path):
    """All samples are checked: a file with one wrong sample was made wrongly, whichever samples are used."""
    with pytest.raises(InputError, match="sample 3"):
        load_saved(path, [*good_samples(), sample(1, 5, WORDS)], max_samples=1)


def test_no_sample_has_an_answer(path):
    torch.save([sample(2, 5, 6), sample(0), sample(1, 7)], path)
    refusal(path, "no usable sample", "3 samples")


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    "content", [[], {}, {"samples": []}, sample(1, 5, 6), torch.tensor([1, 2]), tuple(good_samples()), "text", None]
)
def test_not_a_list_of_samples(path, content):
    torch.save(content, path)
    refusal(path, "does not hold a list")


def test_missing_file_and_folder(path, tmp_path):
    refusal(path, "does not exist")
    refusal(str(tmp_path))


def test_truncated_file(path):
    """Cut anywhere, as by a full disk or an unfinished copy."""
    torch.save(good_samples() * 20, path)
    with open(path, "rb") as file:
        whole = file.read()
    for size in [*range(0, len(whole), 97), len(whole) - 1]:
        with open(path, "wb") as file:
            file.write(whole[:size])
        refusal(path)


def test_flipped_bits_are_noticed_or_harmless(path):
    """torch.load does not look at the checksums: without care, a flipped bit becomes another token."""
    torch.save(good_samples() * 10, path)
    with open(path, "rb") as file:
        whole = file.read()
    good, generator, refused = load(path), random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        with open(path, "wb") as file:
            file.write(damaged)
        try:
            samples = load(path)
        except InputError as error:
            assert path in str(error)
            refused += 1
        else:  # a bit that does not matter, such as one of a date or of the zip's padding
            assert torch.equal(samples.ids, good.ids) and torch.equal(samples.prompt_len, good.prompt_len)
    assert 50 < refused < 300


def good_zip_bad_pickle(pickled):
    def write(path):
        with zipfile.ZipFile(path, "w") as file:
            for name, content in (("data.pkl", pickled), ("version", b"3\n"), ("byteorder", b"little")):
                file.writestr(f"archive/{name}", content)

    return write


def other_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "not what torch.save writes")


def plain_pickle(path):
    with open(path, "wb") as file:
        pickle.dump([{"prompt_len": 1, "full_ids": [5, 6]}], file)


def old_format(path):
    torch.save(good_samples(), path, _use_new_zipfile_serialization=False)


def bytes_of(content):
    def write(path):
        with open(path, "wb") as file:
            file.write(content)

    return write


@pytest.mark.parametrize(
    "write",
    [
        bytes_of(b"text\n"),
        bytes_of(bytes(range(256)) * 40),
        bytes_of(b"PK\x03\x04" * 99),
        other_zip,
        good_zip_bad_pickle(b""),
        good_zip_bad_pickle(b"h\x05."),
        plain_pickle,
        old_format,
    ],
)
def test_garbage(path, write):
    write(path)
    refusal(path)


# ---------------------------------------------------------------- files that would run code


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.mark.parametrize("zipped, in_sample", itertools.product((True, False), repeat=2))
def test_code_in_the_file_does_not_run(path, tmp_path, zipped, in_sample):
    marker = tmp_path / "marker"
    content = [*good_samples(), sample(1, 5, 6) | {"type": Evil(marker)}] if in_sample else Evil(marker)
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refusal(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the file is a real trap: an unsafe load falls into it
    assert marker.exists()
