"""Steps on a stream of their own give the numbers of steps on the default stream.

Run by `tests/gpu.sh` where there is a CUDA device: `python tests/two_streams.py`.
"""

import contextlib
import sys

import torch
from torch import nn

from optgen.games import Game, Player
from optgen.optim import Adam
from optgen.rules import Consensus, Extragradient


def walk(make_rule, stream: "torch.cuda.Stream | None") -> torch.Tensor:
    """Return the weights of two players after ten steps, taken on a stream or the default one."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)) for _ in range(2)]
    nets = [net.cuda().double() for net in nets]
    losses = (
        lambda x: (nets[0](x) * nets[1](x)).mean(),
        lambda x: -(nets[0](x) * nets[1](x)).mean() + nets[1](x).square().mean(),
    )
    players = [Player(net, f, Adam(net.parameters()), clip=0.1) for net, f in zip(nets, losses)]
    game = Game(G=players[0], D=players[1], rule=make_rule())
    batches = torch.randn(10, 128, 64, dtype=torch.float64, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        for x in batches:
            game.step(x)
    torch.cuda.synchronize()
    return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])


def main() -> int:
    """Compare the streams by each rule, and return the number of rules that differ."""
    if not torch.cuda.is_available():
        print("two_streams.py: PyTorch finds no CUDA device here", file=sys.stderr)
        return 3
    wrong = 0
    for make_rule in (lambda: None, Extragradient, lambda: Consensus(0.1)):
        expected, found = walk(make_rule, None), walk(make_rule, torch.cuda.Stream())
        rule = make_rule()
        name = type(rule).__name__ if rule is not None else "Simultaneous"
        error = (expected - found).abs().max().item()
        print(f"{name}: largest difference {error:.1e}")
        wrong += error > 1e-10
    return wrong


if __name__ == "__main__":
    sys.exit(main())
