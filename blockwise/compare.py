"""How far the logits of a merged checkpoint are from those of its base + adapters, on a few training samples.

    python -m blockwise.compare --checkpoint ckpts_stagewise_sft_32_step0025 --data MathQA_256.pt

The adapters are those in the checkpoint's folder adapter/, the base is the one that they name. A training prints such
a line for its last checkpoint, but in its own precision, and with samples that are padded to MAX_LEN.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

from blockwise.cli import InputError, run_script


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder that a training has written")
    parser.add_argument("--data", required=True, help=".pt file of pt.py, of which the first samples are taken")
    parser.add_argument("--base", help="folder or hub id, if the one that the adapters name has moved")
    args = parser.parse_args()
    import torch  # only now: a mistyped flag is reported without waiting for it

    from blockwise.data import make_samples, read_pt
    from blockwise.models import base as models
    from blockwise.models import checkpoint, hub
    from blockwise.run.ranks import Ranks

    adapter = Path(args.checkpoint) / checkpoint.ADAPTER
    if not adapter.is_dir():
        raise InputError(
            f"--checkpoint {args.checkpoint} has no folder {checkpoint.ADAPTER}/, so nothing to compare with."
        )
    data = read_pt(args.data)
    base = hub.local_folder(args.base or checkpoint.adapter_config(adapter).base_model_name_or_path)
    model = models.load_model(base, torch.float32, Ranks.from_environment().device)
    config, mask_id = model.config, getattr(model.config, "mask_token_id", None)
    if mask_id is None or config.pad_token_id is None:
        raise InputError(f"{base}/config.json lacks mask_token_id or pad_token_id.")
    form = {
        "MAX_LEN": config.max_position_embeddings,
        "MAX_SAMPLES": checkpoint.COMPARED,
        "MASK_ID": mask_id,
        "EOS_TAIL": False,
    }
    samples = make_samples(data, SimpleNamespace(DATA_PT=args.data, **form), config).to(model.device)
    ids = samples.ids[:, : int(samples.length.max())].to(model.device).long()  # without the padding that all have
    model = checkpoint.load_adapter(model, adapter).eval()
    lengths = samples.prompt_len, samples.length
    print(checkpoint.logit_gap(model, base, Path(args.checkpoint), ids, *lengths, mask_id))


if __name__ == "__main__":
    run_script(main)
