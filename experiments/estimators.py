"""How far the log-probabilities of train_grpo.py's estimators are from those that decoding had, on a checkpoint.

    python -m experiments.estimators --model demo/base --block 4

The checkpoint answers problems of long addition several times, at temperature 1, with one token per step. What decoding
computed in all of its steps (`trace`) is what the other estimators are compared with: by the mean distance per token,
and by the correlation within groups of answers to the same problem, which is what a group-relative method goes by.
"""

import argparse
import io
from contextlib import redirect_stdout
from types import SimpleNamespace

from blockwise.cli import run_script

LENGTH = 16  # tokens of an answer
ESTIMATORS = {
    "block": {"ESTIMATOR": "block"},
    "onestep": {"ESTIMATOR": "onestep"},
    "onestep, 15 % of the prompt masked": {"ESTIMATOR": "onestep", "P_MASK_PROMPT": 0.15},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/base", help="folder of a checkpoint (default: demo/base)")
    parser.add_argument("--data", default="demo_run/data/train.jsonl", help="problems (default: those of the demo)")
    parser.add_argument("--block", type=int, default=4, help="tokens of a block (default: 4)")
    parser.add_argument("--problems", type=int, default=64, help="(default: 64)")
    parser.add_argument("--group", type=int, default=4, help="answers to each (default: 4)")
    args = parser.parse_args()
    import torch

    true, state, model = log_probs(args, {"ESTIMATOR": "trace"})
    print(f"{args.model}, blocks of {args.block}: {len(true)} answers, log p per token {true.mean() / LENGTH:.3f}")
    print(f"{'':36}distance per token  correlation in groups")
    for name, knobs in ESTIMATORS.items():
        found, *_ = log_probs(args, knobs, state, model)
        within = [(x - x.view(-1, args.group).mean(dim=1).repeat_interleave(args.group)) for x in (true, found)]
        correlation = torch.corrcoef(torch.stack(within))[0, 1]
        print(f"{name:36}{(found - true).abs().mean() / LENGTH:18.3f}{correlation:23.2f}")


def log_probs(args: argparse.Namespace, knobs: dict, state: dict | None = None, model=None) -> tuple:
    """Those of all answers, (N,) summed over their tokens, by an estimator. Returns the round and the model, too.

    state, model: of an earlier call, whose answers are used again.
    """
    import torch

    import train_grpo
    from blockwise.data import derive_seed
    from blockwise.models import base as models
    from blockwise.models import hub
    from blockwise.rollouts import Rollouts
    from blockwise.run.ranks import Ranks

    parts = {"block": LENGTH // args.block, "trace": LENGTH, "onestep": 1}[knobs["ESTIMATOR"]]
    knobs = {name: value for name, value in vars(train_grpo).items() if name.isupper()} | {
        "MODEL_NAME": args.model, "DATA": args.data, "BLOCK_SIZE": args.block, "GEN_LENGTH": LENGTH, "STEPS": LENGTH,
        "PROMPTS": args.problems, "GROUP": args.group, "MICRO_BSIZE": args.group, "UPDATES": parts, **knobs,
    }  # fmt: skip
    folder, ranks = hub.local_folder(args.model), Ranks(0, 1, 0, 1, torch.device("cpu"))
    config = models.load_config(folder)
    knobs = SimpleNamespace(**knobs | {"MASK_ID": config.mask_token_id})
    rollouts, model = Rollouts(knobs), model or models.load_model(folder, torch.float32)
    with redirect_stdout(io.StringIO()):  # the sizes of a training
        rollouts.prepare(folder, config, ranks)
    state = state or rollouts.make(model, ranks, 1, lambda: None)
    samples, plan = rollouts.use(1, state, ranks.device)
    total, size = 0.0, args.problems * args.group
    for update in range(parts):
        batch = samples.batch(*plan[update * size : (update + 1) * size].T)
        generator = torch.Generator().manual_seed(derive_seed(knobs.SEED, "masks", update))
        with torch.no_grad():
            found = rollouts.log_probs(model.eval(), ranks, train_grpo.noise(batch, generator, knobs))
        total = total + found.double().sum(dim=1)
    return total, state, model


if __name__ == "__main__":
    run_script(main)
