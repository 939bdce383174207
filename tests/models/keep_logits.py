"""Runs train_blockwise.py; with its checkpoint it also keeps the logits of the live model, for test_kinds.py."""

import torch

import train_blockwise
from blockwise import trainer


def save_checkpoint(run, step):
    """Saves the checkpoint, then logits.pt: ids (2, 24) and logits (2, 24, V) of the model as it was trained."""
    save(run, step)
    ids = torch.randint(8, 400, (2, 24), generator=torch.Generator().manual_seed(0))
    run.model.eval()
    with torch.no_grad():
        torch.save((ids, run.model(ids).logits), "logits.pt")
    run.model.train()


if __name__ == "__main__":
    save, trainer.save_checkpoint = trainer.save_checkpoint, save_checkpoint
    train_blockwise.main()
