"""`python -m optgen` is `optgen`: what `torchrun -m` starts."""

from optgen.cli.main import main

if __name__ == "__main__":
    main()
