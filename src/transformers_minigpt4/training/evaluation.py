"""The loss on held-out rows: a mean over all their learned tokens, however they are batched and distributed."""

from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import PreTrainedModel
from transformers.trainer_utils import EvalLoopOutput, has_length

from transformers_minigpt4.data.schema import Row
from transformers_minigpt4.utils.families import family_of

from .collator import IGNORED, Batch, Collator


TOKENS = "learned_tokens"  # its key in a batch of evaluation; the trainer removes it

if TYPE_CHECKING:  # the mixin overrides and calls methods of the trainer that it is put in front of
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class EvaluationMixin(_Trainer):
    """
    Goes in front of a trainer class; its `eval_loss` is the mean over all learned tokens of the held-out rows.

    transformers' own is a mean over batches, so it changes with the batch size, with packing and with the number of
    processes. Each row counts once here. Evaluation draws no random numbers, so a run with it takes the same steps as
    one without.
    """

    model: PreTrainedModel

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """See [`~Trainer.get_eval_dataloader`]."""
        known: Any = self.eval_dataset
        chosen = known if eval_dataset is None else eval_dataset
        dataset = known[chosen] if isinstance(chosen, str) else chosen
        streamed = dataset is None or isinstance(dataset, IterableDataset) or not has_length(dataset)
        if streamed or self.compute_metrics is not None:  # which needs the logits of transformers' own loop
            return super().get_eval_dataloader(eval_dataset)
        batches = RankBatches(
            dataset,
            self.args.eval_batch_size,
            self.args.process_index,
            self.args.world_size,
            self.data_collator,
            shifted=not family_of(self.model.config).encoder_decoder,
        )
        return DataLoader(
            batches,
            batch_size=None,
            collate_fn=_unchanged,  # type: ignore[arg-type]  # annotated for batches that the loader makes
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            generator=torch.Generator(),  # otherwise the loader would draw from the generator of training
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """See [`~Trainer.evaluation_loop`]."""
        self._eval_losses: list[torch.Tensor] = []  # of this process: (sum of losses, tokens) of each batch
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if not isinstance(dataloader.dataset, RankBatches):
            return output
        mine = torch.stack(self._eval_losses).sum(dim=0).tolist()
        loss, tokens = (sum(values) for values in zip(*gather_object([mine])))
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": loss / tokens}
        return output._replace(metrics=metrics, num_samples=len(dataloader.dataset.rows))

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """See [`~Trainer.prediction_step`]."""
        tokens = inputs.pop(TOKENS, None)
        if tokens is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        # Not the trainer's own, which may scale the loss by the tokens of all processes.
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = cast(torch.Tensor, self.compute_loss(model, send_to_device(inputs, self.args.device))).mean()
        total = torch.tensor([tokens, tokens], dtype=torch.float64)
        total[0] *= loss.double().cpu()
        self._eval_losses.append(total)
        return loss, None, None


class RankBatches(Dataset):
    """
    Batches of one process, each with the number of its learned tokens, under the key `learned_tokens`.

    All processes have equally many, because models that are spread over processes wait for each other: a process that
    runs out repeats the first row, with a count of 0.

    Args:
        rows (`Sequence`): All rows of the evaluation.
        batch_size (`int`): Rows per batch.
        rank (`int`), world_size (`int`): This process, and how many share the rows.
        collator (`Callable`): The trainer's own.
        shifted (`bool`): Whether a label is predicted by the position before it, as in a decoder.
    """

    def __init__(
        self, rows: Any, batch_size: int, rank: int, world_size: int, collator: Collator, shifted: bool = True
    ) -> None:
        self.rows, self.batch_size, self.collator, self.shifted = rows, batch_size, collator, shifted
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return -(-len(self.rows) // (self.batch_size * self.world_size))

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        start = (index * self.world_size + self.rank) * self.batch_size
        rows: list[Row] = [self.rows[i] for i in range(start, min(start + self.batch_size, len(self.rows)))]
        batch = dict(self.collator(rows or [self.rows[0]]))
        labels = batch["labels"][:, 1:] if self.shifted else batch["labels"]
        return {**batch, TOKENS: int((labels != IGNORED).sum()) if rows else 0}


def _unchanged(batch: Batch) -> Batch:
    return batch
