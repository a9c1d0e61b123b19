"""Text: files, windows, the LSTM of tokens, bits per character, and the command line.

The oracles are plain Python and NumPy, and a loop over `nn.LSTMCell` in float64.
"""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cli_helpers import assert_one_line, edit_config, read_options, read_state, resume, run
from data_helpers import refuses
from optgen.averaging import evaluating
from optgen.data import text as text_module
from optgen.data.images import Batch
from optgen.data.loading import Loader, is_text, load, resolve_data
from optgen.data.sequences import Sequences
from optgen.data.text import Characters, Numbers, Text, alice, text
from optgen.models.tokens import TokenLSTM
from optgen.schemes.language import LanguageModel, ratio_with_error
from optgen.testing import generator
from optgen.training.trainer import fit

RUSSIAN = "Мама мыла раму.\r\nПапа пил чай, «ещё»!\r\n\r\n" * 20 + "Ъ конец"
RESULTS = Path(__file__).parent.parent / "nbs" / "30_schemes" / "results" / "language.json"


@pytest.fixture
def novel(tmp_path):
    """Return a text file of 4,000 characters with structure."""
    draw = generator(3)
    words = ["alice ", "the ", "cat ", "said ", "to\n", "queen "]
    chosen = torch.randint(6, (2000,), generator=draw).tolist()
    path = tmp_path / "novel.txt"
    path.write_text("".join(words[i] for i in chosen)[:4000])
    return path


def small_model(vocab: int, seed: int = 0, **sizes: int) -> TokenLSTM:
    """Return a small model in float64, far from uniform."""
    torch.manual_seed(seed)
    model = TokenLSTM(vocab, **{"embed": 3, "hidden": 5, **sizes}).double()
    model.out.weight.data.mul_(5)
    return model


def loop_nats(model: TokenLSTM, tokens: list[int]) -> list[float]:
    """Return the nats of each token, read one after another by cells of the same weights."""
    cells, states = [], []
    for layer in range(model.lstm.num_layers):
        inputs = model.embed.embedding_dim if layer == 0 else model.lstm.hidden_size
        cell = nn.LSTMCell(inputs, model.lstm.hidden_size).double()
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(cell, kind).data.copy_(getattr(model.lstm, f"{kind}_l{layer}"))
        cells.append(cell)
        states.append(None)
    nats, previous = [], model.vocab
    with torch.no_grad():
        for token in tokens:
            h = model.embed.weight[previous][None]
            for layer, cell in enumerate(cells):
                states[layer] = cell(h, states[layer])
                h = states[layer][0]
            logits = (model.out.weight @ h[0] + model.out.bias).numpy()
            nats.append(math.log(np.exp(logits - logits.max()).sum()) + logits.max())
            nats[-1] -= logits[token]
            previous = token
    return nats


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 2**22])
def test_a_file_is_read_as_python_reads_it_whatever_the_chunk(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CHUNK", chunk)
    path = tmp_path / "a.txt"
    for content in ("\ufeff" + RUSSIAN, RUSSIAN, "a\rb\r\n\n\r" * 60, "é" * 200 + "\r"):
        path.write_bytes(content.encode())
        expected = path.read_text(encoding="utf-8-sig")
        assert text(path, "train", valid=0, test=0, length=4).string == expected


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.25, 0.5), (0.0, 0.3), (0.013, 0.017)])
def test_parts_are_contiguous_and_cut_at_whole_characters(shares, tmp_path):
    valid, test = shares
    path = tmp_path / "a.txt"
    path.write_text(RUSSIAN, newline="")
    content = RUSSIAN.replace("\r\n", "\n").encode()
    end = len(content) - math.ceil(test * len(content))
    while content[end] & 0xC0 == 0x80:
        end += 1
    begin = end - math.ceil(valid * end)
    while begin < end and content[begin] & 0xC0 == 0x80:
        begin += 1
    expected = {"train": content[:begin], "valid": content[begin:end], "test": content[end:]}
    for split, part in expected.items():
        if part:
            for tokens in ("bytes", "characters"):
                found = text(path, split, 16, tokens, valid, test)
                kinds = found.tokenizer.count_characters(found.tokens)
                assert kinds.sum() == len(part.decode())
            assert text(path, split, 16, valid=valid, test=test).string == part.decode()
        else:
            with refuses("a.txt", split, "holds no text"):
                text(path, split, 16, valid=valid, test=test)


def test_the_alphabet_is_of_the_training_part_and_what_occurs_once_is_unknown(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcabc" * 20 + "x" + "abz" * 20)
    train = text(path, tokens="characters", length=8, valid=0.0, test=0.3)
    assert "z" in train.string or train.tokenizer.alphabet == "abc"
    counts = Counter(path.read_text()[: len(train.tokens)])
    assert train.tokenizer.alphabet == "".join(sorted(c for c in counts if counts[c] > 1))
    assert "x" not in train.tokenizer.alphabet
    test = text(path, "test", 8, train.tokenizer, 0.0, 0.3)
    expected = [{"a": 0, "b": 1, "c": 2}.get(c, len(train.tokenizer.alphabet)) for c in "ab"]
    assert [train.tokenizer.encode("ab").tolist(), test.tokenizer] == [expected, train.tokenizer]


def test_bad_files_are_one_error(tmp_path):
    path = tmp_path / "bad.txt"
    for content, words in (
        (b"", "holds no text"),
        (b"abc\xff", "byte 3"),
        (b"x" * 50 + "é".encode()[:1], "byte 50"),
        ("text".encode("utf-16-le"), "NUL"),
        (b"ab\0cd", "NUL"),
    ):
        path.write_bytes(content)
        with refuses("bad.txt", words):
            text(path, valid=0, test=0)
    with refuses("folder"):
        text(tmp_path)
    with refuses("gone.txt", "no such file"):
        text(tmp_path / "gone.txt")
    with refuses("/dev/null", "no file"):
        text("/dev/null")


def test_the_position_of_an_invalid_byte_is_that_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(text_module, "CHUNK", 4)
    path = tmp_path / "bad.txt"
    path.write_bytes("\ufeffaé\r\nbбв".encode() + b"\xe9 d" * 3)
    with refuses("byte 13"):
        text(path)


def test_a_loader_serves_int64_windows_and_goes_on_in_mid_epoch():
    data = alice(length=50).part(0, 1234, "train")
    loader, again = (Loader(data, 4, seed=3) for _ in range(2))
    batches = list(loader)
    assert {batch.x.dtype for batch in batches} == {torch.int64}
    seen = torch.cat([batch.x for batch in batches]).tolist()
    content = list(data.string.encode()) + 16 * [256]
    assert sorted(seen) == sorted(content[i : i + 50] for i in range(0, 1250, 50))
    iterator = iter(again)
    for _ in range(3):
        next(iterator)
    fresh = Loader(data, 4, seed=3)
    fresh.load_state_dict(again.state_dict())
    assert all(torch.equal(a.x, b.x) for a, b in zip(batches[3:], fresh, strict=True))
    with refuses("another loader"):
        Loader(data.part(0, 1233, "train"), 4, seed=3).load_state_dict(again.state_dict())


def test_names_of_texts_are_known(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 9)
    assert is_text("alice") and is_text(resolve_data(tmp_path / "a.txt"))
    assert not is_text("digits") and not is_text(str(tmp_path))
    assert load("alice", "test").string == alice("test").string
    assert load(tmp_path / "a.txt", holdout=0.5).string == "some text " * 4 + "some "


@pytest.mark.parametrize("layers, batch, seed", [(1, 3, 0), (2, 7, 1), (1, 100, 2)])
def test_every_character_counts_once_with_all_that_came_before_it(layers, batch, seed, monkeypatch):
    monkeypatch.setattr("optgen.schemes.language.STREAM", 37)
    model = small_model(256, seed, layers=layers, hidden=4)
    data = alice("valid", length=11).part(5, 305, "valid")
    found = LanguageModel(model).evaluate(Loader(data, batch, shuffle=False))
    nats = np.array(loop_nats(model, data.tokens.tolist()))
    assert abs(found["loss"] - nats.mean()) < 1e-10 and found["n"] == 300
    bits = nats / math.log(2)
    assert abs(found["bits_per_char"] - bits.mean()) < 1e-10
    blocks = [bits[i : i + 11] for i in range(0, 300, 11)]
    squares = sum((b.sum() - bits.mean() * len(b)) ** 2 for b in blocks)
    m = len(blocks)
    assert abs(found["bits_per_char_se"] - math.sqrt(m / (m - 1) * squares) / 300) < 1e-10


def test_sequences_of_their_own_are_each_read_from_the_beginning():
    model = small_model(6)
    tokens = torch.randint(6, (5, 9), generator=generator())
    scheme = LanguageModel(model, tokenizer=Numbers(6), continuous=False)
    found = scheme.evaluate(Loader(Sequences(tokens), 2, shuffle=False))
    expected = np.mean([loop_nats(model, row) for row in tokens.tolist()])
    assert abs(found["loss"] - expected) < 1e-10
    assert abs(found["bits_per_token"] - expected / math.log(2)) < 1e-10 and found["n"] == 45


def test_bits_per_character_of_bytes_are_bits_per_byte_times_bytes_per_character(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(RUSSIAN)
    data = text(path, "test", length=10)
    found = LanguageModel(small_model(256)).evaluate(Loader(data, 4, shuffle=False))
    part = data.string
    ratio = len(part.encode()) / len(part)
    assert ratio > 1.3 and found["n"] == len(part)
    assert abs(found["bits_per_char"] - found["loss"] / math.log(2) * ratio) < 1e-10


def test_an_unknown_character_costs_the_choice_among_all_others():
    tokenizer = Characters("abc")
    model = small_model(4)
    data = Text(tokenizer.encode("abxcaby"), tokenizer, 3, split="test")
    found = LanguageModel(model, tokenizer=tokenizer).evaluate(Loader(data, 2, shuffle=False))
    nats = loop_nats(model, [0, 1, 3, 2, 0, 1, 3])
    valid = sum(not 0xD800 <= i < 0xE000 for i in range(0x110000)) - 3
    expected = (sum(nats) + 2 * math.log(valid)) / math.log(2) / 7
    assert abs(found["bits_per_char"] - expected) < 1e-10
    assert abs(found["loss"] - np.mean(nats)) < 1e-10


def test_the_error_of_a_quotient_is_that_of_resampled_blocks():
    draw = generator(5)
    counts = torch.randint(3, 9, (400,), generator=draw).double()
    totals = 2 * counts + torch.randn(400, generator=draw, dtype=torch.float64) * counts.sqrt()
    ratio, error = ratio_with_error(totals, counts)
    chosen = torch.randint(400, (4000, 400), generator=draw)
    resampled = totals[chosen].sum(1) / counts[chosen].sum(1)
    assert abs(ratio - (totals.sum() / counts.sum()).item()) < 1e-12
    assert abs(error / resampled.std().item() - 1) < 0.06
    assert math.isnan(ratio_with_error(totals[:1], counts[:1])[1])


def test_the_loss_is_the_mean_over_windows_of_nats_a_token():
    model = small_model(256)
    data = alice(length=8).part(0, 21, "train")
    batch = Batch(data.images.long())
    rows = [loop_nats(model, list(data.string.encode())[i : i + 8]) for i in (0, 8, 16)]
    found = LanguageModel(model).loss(batch).item()
    assert abs(found - sum(map(sum, rows)) / 24) < 1e-10


def test_a_model_and_a_tokenizer_of_other_sizes_are_refused():
    with pytest.raises(ValueError, match="vocab=tokenizer.vocab"):
        LanguageModel(small_model(5))
    with pytest.raises(ValueError, match="nothing to evaluate"):
        LanguageModel(small_model(256)).evaluate([])


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_a_text_begins_with_its_prompt_and_is_drawn_at_its_temperature(temperature):
    tokenizer = Characters("abc")
    model = small_model(4)
    scheme = LanguageModel(model, tokenizer=tokenizer)
    tokens = scheme.sample(3000, 1, "ca", temperature, generator())
    assert {text[:2] for text in scheme.decode(tokens)} == {"ca"}
    logits = torch.tensor([-loop_nats(model, [2, 0, k])[2] for k in range(3)])
    p = (logits / temperature).softmax(0)  # the unknown character is never drawn
    counts = torch.bincount(tokens[:, 2], minlength=3)
    chi2 = ((counts - 3000 * p) ** 2 / (3000 * p)).sum().item()
    assert chi2 < 13.8  # exceeded with probability 0.001 at two degrees of freedom
    with pytest.raises(ValueError, match="'x'"):
        scheme.sample(1, 5, "axb")


def test_training_learns_and_a_resumed_fit_is_the_same_bit_for_bit(tmp_path):
    data = alice(length=32).part(0, 6400, "train")
    valid = alice("valid", length=32).part(0, 640, "valid")

    def scheme() -> LanguageModel:
        torch.manual_seed(0)
        return LanguageModel(TokenLSTM(256, 8, 16, dropout=0.3))

    options = {"batch_size": 20, "progress": "none", "ema": 0.9, "seed": 4}
    straight, parts = scheme(), scheme()
    records = fit(straight, data, valid=valid, epochs=4, **options)
    folder = tmp_path / "run"
    fit(parts, data, valid=valid, epochs=2, out=folder, **options)
    resumed = scheme()
    fit(resumed, data, valid=valid, epochs=4, out=folder, resume=True, **options)
    assert records[-1]["valid"]["bits_per_char"] < records[0]["valid"]["bits_per_char"] - 0.1
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with evaluating(resumed):
        found = resumed.evaluate(Loader(valid, 500, shuffle=False))
    assert found == records[-1]["valid"]


# The command line.


@pytest.fixture
def trained(novel, tmp_path):
    """Return a function that trains a small run on the novel and returns its folder."""

    def train(words: str = "", name: str = "run") -> Path:
        args = f"--hidden 12 --length 16 --epochs 2 --progress none {words} --out"
        assert run("train lstm --data", novel, args, tmp_path / name) == 0
        return tmp_path / name

    return train


@pytest.mark.parametrize("words", ["", "--tokens characters --layers 2 --dropout 0"])
def test_a_run_on_text_is_trained_resumed_measured_and_sampled(words, trained, capsys, novel):
    folder = trained(words)
    config = json.loads((folder / "config.json").read_text())
    assert config["shape"] == [16] and config["options"]["binarize"] == "none"
    assert "windows of 16 " in capsys.readouterr().out
    assert resume(folder, 3) == 0
    straight = trained(f"{words} --epochs 3", "straight")
    a, b = (read_state(path)["scheme"]["model"]["weights"] for path in (folder, straight))
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert len(list((folder / "samples").glob("epoch-000?.txt"))) == 3
    capsys.readouterr()
    assert run("evaluate --json", folder) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 400 and found["split"] == "test" and 0 < found["bits_per_char"] < 9
    assert found["tokens"] == config["options"]["tokens"] and "pixels" not in found
    sample = ("sample", folder, '--prompt "alice " --temperature 0.5 --length 40 --seed 7')
    texts = []
    for _ in range(2):
        assert run(*sample) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("alice ") and len(texts[0]) > 40
    out = folder / "two.txt"
    assert run(*sample, "--n 2 --out", out) == 0
    assert out.read_text().count("alice ") >= 2 and "2 texts" in capsys.readouterr().out


def test_options_of_the_other_kind_of_data_are_refused(novel, capsys, tmp_path):
    out = ("--progress none --out", tmp_path / "run")
    for words in ("--binarize static", "--levels 4", "--image-size 28"):
        assert run("train lstm --data", novel, words, *out) == 2
        assert_one_line(capsys.readouterr().err, words.split()[0], "is for images")
    for words in ("--tokens bytes", "--length 8", "--dropout 0.1"):
        assert run("train lstm --data digits", words, *out) == 2
        assert_one_line(capsys.readouterr().err, words.split()[0], "is for text")
    assert run("train beta-vae --data", novel, *out) == 2
    assert_one_line(capsys.readouterr().err, "beta-vae takes images", "novel.txt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ("--prompt ünder", "not learned"),
        ("--temperature -1", "--temperature"),
        ("--out picture.png", ".txt"),
        ("--length 0", "--length"),
    ],
)
def test_a_sample_that_cannot_be_drawn_is_one_line(words, message, trained, capsys):
    folder = trained("--tokens characters")
    capsys.readouterr()
    assert run("sample", folder, words) == 2
    assert_one_line(capsys.readouterr().err, message.replace("not learned", "has not learned"))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "holds no text"),
        (b"caf\xe9" * 999, "not UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "not UTF-8"),
        (b"too short", "fewer than a window of 64"),
        (b"a" * 70, "56 bytes to train on"),
    ],
)
def test_a_file_that_cannot_be_trained_on_is_one_line(content, words, tmp_path, capsys):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert run("train lstm --progress none --data", path, "--out", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert_one_line(message, "bad.txt", words)
    assert not (tmp_path / "run").exists()


def test_a_changed_configuration_is_one_line(trained, capsys):
    folder = trained("--tokens characters")
    for change, word in (
        ({"alphabet": "ba"}, "alphabet"),
        ({"alphabet": 3}, "alphabet"),
        ({"length": 0}, "length"),
        ({"tokens": None}, "tokens"),
    ):
        before = read_options(folder)
        edit_config(folder, **change)
        capsys.readouterr()
        assert run("sample", folder) == 2
        assert_one_line(capsys.readouterr().err, word)
        edit_config(folder, **before)
    assert run("sample", folder) == 0


def test_a_scheme_of_images_has_no_run_of_text(trained, capsys):
    folder = trained()
    edit_config(folder, scheme="made")
    capsys.readouterr()
    assert run("sample", folder) == 2
    assert_one_line(capsys.readouterr().err, "three whole numbers")


# The baseline of the page, a second time: counts of strings, probabilities by recursion.


def kneser_ney_bits(train: str, held_out: str, order: int) -> float:
    """Return bits per character of interpolated Kneser-Ney smoothing over 256 symbols."""
    grams = Counter(train[i : i + order] for i in range(len(train) - order + 1))
    tables = {order: grams}
    for n in range(order - 1, 0, -1):
        tables[n] = Counter(gram[1:] for gram in tables[n + 1])
    sums, kinds, discounts = {}, {}, {}
    for n, table in tables.items():
        sums[n], kinds[n] = defaultdict(int), defaultdict(int)
        for gram, count in table.items():
            sums[n][gram[:-1]] += count
            kinds[n][gram[:-1]] += 1
        ones, twos = (sum(c == k for c in table.values()) for k in (1, 2))
        discounts[n] = ones / (ones + 2 * twos)

    def probability(context: str, symbol: str, n: int) -> float:
        if n == 0:
            return 1 / 256
        lower = probability(context[1:], symbol, n - 1)
        total = sums[n].get(context, 0)
        if not total:
            return lower
        kept = max(tables[n].get(context + symbol, 0) - discounts[n], 0)
        return (kept + discounts[n] * kinds[n][context] * lower) / total

    bits = 0.0
    for i, symbol in enumerate(held_out):
        context = held_out[max(0, i - order + 1) : i]
        bits -= math.log2(probability(context, symbol, len(context) + 1))
    return bits / len(held_out)


@pytest.mark.parametrize("order", [3, 5])
def test_the_baseline_of_the_page_is_kneser_ney(order):
    recorded = json.loads(RESULTS.read_text())["kneser_ney"][str(order)]["bits_per_char"]
    found = kneser_ney_bits(alice().string, alice("test").string, order)
    assert abs(found - recorded) < 1e-6
