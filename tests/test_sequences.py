"Token sequences of the installed package: what is refused, and that training on them resumes."

import pytest
import torch

from data_helpers import refuses
from optgen.data.loading import Loader, split_holdout
from optgen.data.sequences import Sequences
from optgen.games import Game, Player
from optgen.models.synthetic import synthetic_sequences
from optgen.optim import SGD
from optgen.training.trainer import fit


@pytest.mark.parametrize(
    "tokens, split, words",
    [
        (torch.zeros(3, 4), "train", ("float32", "int64 (N, T)")),
        (torch.zeros(3, 4, 1, dtype=torch.int64), "train", ("int64 (N, T)",)),
        (torch.tensor([[0, -7]]), "train", ("-7",)),
        (torch.tensor([[0]]), "dev", ("dev", "valid")),
    ],
)
def test_bad_sequences_are_refused(tokens, split, words):
    with refuses(*words):
        Sequences(tokens, split=split)


def test_tokens_are_never_binarized():
    with refuses("tokens"):
        Loader(Sequences(torch.tensor([[0]])), 1, binarize="dynamic")


def test_sequences_are_held_out_as_sequences():
    rest, held = split_holdout(synthetic_sequences("test"), 0.25)
    assert len(rest) == 1500 and type(held) is Sequences and held.split == "test"


class Unigram(torch.nn.Module):
    "Tokens drawn independently of each other."

    def __init__(self, vocab):
        super().__init__()
        self.logits, self.drop = torch.nn.Parameter(torch.zeros(vocab)), torch.nn.Dropout(0.1)

    def forward(self, x):
        "Return the negative log-likelihood of tokens (B, T)."
        return -self.drop(self.logits).log_softmax(0)[x].sum(1)


def unigram_game():
    "Return a game of one unigram model, and the model."
    model = Unigram(1000)
    game = Game(model=Player(model, lambda b: model(b.x).mean(), SGD(model.parameters(), lr=2.0)))
    game.evaluate = lambda batches: {"loss": torch.cat([model(b.x) for b in batches]).mean().item()}
    return game, model


def test_sequences_train_and_resume_bit_for_bit(tmp_path):
    train, valid = synthetic_sequences("valid"), synthetic_sequences("test")

    def run(out, epochs, resume=False):
        "Return the logits and the validation losses of a run."
        game, model = unigram_game()
        options = {"resume": resume, "seed": 3, "samples": 0, "progress": "none"}
        records = fit(game, train, epochs=epochs, valid=valid, out=tmp_path / out, **options)
        return model.logits.detach(), [record["valid"]["loss"] for record in records]

    want, losses = run("whole", 3)
    run("parts", 2)
    got, again = run("parts", 3, resume=True)
    assert torch.equal(got, want) and again == losses and losses[-1] < 69
