"""Train, resume, export and evaluate the bundled model; the trainer is tools/tiny.

python tools/train_tiny.py --out out                                       one H100, about 8 minutes
python tools/train_tiny.py --out out --preset nano --mix add2=1 --row-tokens 128 --minutes 0.4      a CPU

For editing, from the bundled weights on, then its frontier (under 9 minutes on one H100):

python tools/train_tiny.py --out out --init dlx/assets/tiny --minutes 4.5 --lr 1e-3 --own-from 0 --own-share 1 \\
  --own-clean 0.9 --eval-n 25 --eval-every-minutes 99 && \\
python tools/frontier.py --model out --device cuda --graphs off --dtype float32 --max-num-seqs 256 \\
  --max-model-len 512 --thresholds 0.5 0.6 0.7 0.9 --json out/frontier.json single_bd multi_bd edit dmax \\
  "edit:N=4,settle.sure=0.9,edit=0.5" "dmax:N=4"
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.tiny.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout: `tools` is not installed with dlx


def main() -> None:
    import torch

    from dlx import DlxError
    from dlx.evals import THRESHOLDS
    from tools.tiny.train import Call, score, train

    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    handlers = [logging.StreamHandler(), logging.FileHandler(args.out / "train.log")]
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO, handlers=handlers)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    call = Call(
        out=args.out,
        state=args.state or args.out / "state.pt",
        init=args.init,
        device=device,
        minutes=args.call_minutes,
        workers=args.workers or (8 if on_gpu else 1),
        eval_n=args.eval_n or (100 if on_gpu else 4),
        eval_every_minutes=args.eval_every_minutes,
        command=shlex.join(["python", *sys.argv]),
    )
    try:
        recipe = _recipe(args, on_gpu)
        if args.eval_only:
            score(recipe, call, THRESHOLDS, call.eval_n)
        else:
            train(recipe, call)
    except DlxError as error:
        raise SystemExit(f"error: {error}") from None


def _recipe(args: argparse.Namespace, on_gpu: bool) -> Recipe:
    from dlx.tasks import MIX, installed
    from tools.tiny.recipe import Recipe

    recipe = Recipe(
        preset=args.preset,
        mix=installed(args.mix or MIX),
        minutes=args.minutes,
        rows=args.rows or (128 if on_gpu else 16),
        row_tokens=args.row_tokens,
        seed=args.seed,
        lr=args.lr,
        own_from=args.own_from,
        own_share=args.own_share,
        own_clean=args.own_clean,
    )
    if args.blocks is None:
        return recipe
    return replace(recipe, blocks={int(length): share for length, share in args.blocks.items()})


def _shares(text: str) -> dict[str, float]:
    """`a=2,b=1` as a dict."""
    pairs = (pair.partition("=") for pair in text.split(","))
    return {name: float(share) for name, _, share in pairs}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", default="m", help="dimensions: nano, s or m (default m)")
    add("--minutes", type=float, default=7.0, help="training time in all (default 7)")
    add("--call-minutes", type=float, default=1e6, help="wall time of this call; call again to go on")
    add("--out", type=Path, default=Path("out"), help="folder of the checkpoint, train.log and eval.json")
    add("--state", type=Path, help="file to resume from and to save to (default OUT/state.pt)")
    add("--init", type=Path, help="checkpoint folder to start from; a state file wins over it")
    add("--mix", type=_shares, help="tasks and their shares, like gsm=2,add2=1 (default the bundled model's)")
    add("--blocks", type=_shares, help="block lengths and shares, own first (default 16=.6,32=.4)")
    add("--rows", type=int, help="rows a batch (default 128 on a GPU, 16 on a CPU)")
    add("--row-tokens", type=int, default=512, help="tokens a row (default 512)")
    add("--lr", type=float, default=3e-3, help="peak learning rate (default 3e-3)")
    add("--own-from", type=float, default=0.6, help="share of the time before on-policy passes come (default 0.6)")
    add("--own-share", type=float, default=0.5, help="share of the steps then that have one (default 0.5)")
    add("--own-clean", type=float, default=0.0, help="most of its guesses that are told the clean token (default 0)")
    add("--seed", type=int, default=0)
    add("--device", help="cuda or cpu (default: cuda where it is)")
    add("--workers", type=int, help="processes that make rows (default 8 on a GPU, 1 on a CPU)")
    add("--eval-n", type=int, help="held-out prompts a task at the end (default 100 on a GPU, 4 on a CPU)")
    add("--eval-every-minutes", type=float, default=4.0, help="training time between small evaluations")
    add("--eval-only", action="store_true", help="evaluate the checkpoint in OUT, train nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
