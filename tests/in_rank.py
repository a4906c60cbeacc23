"""Calls a test's function in a rank: `python in_rank.py FILE`; the file holds the pickled function and arguments."""

import pickle
import sys
from pathlib import Path


def main(call: Path) -> None:
    # In place of tests/, whose folders have the names of our packages.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import torch

    from utils import distributed

    torch.set_num_threads(1)
    function, arguments = pickle.loads(call.read_bytes())
    with distributed.session("cpu") as run:
        function(run, *arguments)


main(Path(sys.argv[1]))
