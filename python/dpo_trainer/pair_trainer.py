"""`transformers.Trainer` over preference pairs: tokenised datasets and streams, and which process gets which batches."""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch
from accelerate.data_loader import DataLoaderShard
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from .batch.sampler import Batching, PairBatchSampler, PairStream
from .data.account import Account, count_trained_on
from .data.prepare import Preparation, PreparedStream, by_name, is_stream, prepare_dataset
from .errors import ConfigError, DataError
from .settings.config import DPOConfig

logger = logging.getLogger("dpo_trainer")


class PairTrainer(Trainer):
    """The data's side of `DPOTrainer`; it knows no loss.

    Attributes:
        accounts: of every dataset, what was read and what was left out.
    """

    args: DPOConfig
    accounts: list[Account]

    def tokenize(self, dataset: Any, name: str, args: DPOConfig, tokenizer: Any) -> Any:
        preparation = Preparation(**{field.name: getattr(args, field.name) for field in fields(Preparation)})
        if is_stream(dataset):
            self._check_streamable(name, args)
            if name != "train_dataset":
                dataset = list(dataset)  # evaluations need the same rows every time
        if is_stream(dataset):
            dataset = PreparedStream(dataset, tokenizer, preparation, name=name)
            account = dataset.account
        else:
            dataset, account = prepare_dataset(dataset, tokenizer, preparation, name=name)
            if account.dropped:
                logger.warning(account.describe())
        said = {line for other in self.accounts for line in other.remarks}
        for line in account.remarks:
            if line not in said:
                logger.warning(line)
        self.accounts.append(account)
        return dataset

    def _tokenize_all(self, train: Any, evaluation: Any, args: DPOConfig, tokenizer: Any) -> tuple[Any, Any]:
        """Both datasets tokenised; several for evaluation by their names."""
        self.accounts = []
        with args.main_process_first(desc="tokenising", local=True):
            if train is not None:
                train = self.tokenize(train, "train_dataset", args, tokenizer)
            if isinstance(evaluation, dict):
                evaluation = {
                    key: self.tokenize(value, f"eval_dataset {key}", args, tokenizer)
                    for key, value in evaluation.items()
                }
            elif evaluation is not None:
                evaluation = self.tokenize(evaluation, "eval_dataset", args, tokenizer)
        for account, dataset in zip(reversed(self.accounts), reversed(by_name(evaluation).values()), strict=False):
            if repeated := count_trained_on(dataset, train):
                account.trained_on = repeated
                logger.warning(
                    "%s: %s of %s pairs are training pairs too, so its figures are not of held-out pairs",
                    account.name,
                    f"{repeated:,}",
                    f"{account.kept:,}",
                )
        return train, evaluation

    @staticmethod
    def _check_streamable(name: str, args: DPOConfig) -> None:
        if args.precompute_ref_log_probs:
            raise ConfigError(
                "precompute_ref_log_probs: needs all pairs before training; not supported with IterableDataset or another "
                f"stream ({name})"
            )
        if name == "train_dataset" and args.max_steps <= 0:
            raise ConfigError("max_steps: must be given with a stream of pairs, which does not tell its length")

    def get_train_dataloader(self) -> DataLoader:
        """Batches of `PairBatchSampler`, which divides them among processes itself."""
        args, dataset = self.args, cast(Any, self.train_dataset)
        if dataset is None:
            raise DataError("train_dataset: none given, nothing to train on")
        batching = Batching(
            pairs=self._train_batch_size,
            max_tokens=args.max_tokens,
            pad_to_multiple_of=args.padded_to,
            strategy=args.train_sampling_strategy,
            accumulation=args.gradient_accumulation_steps,
            num_processes=self.accelerator.num_processes // self.get_tp_size(),
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )
        share = self.accelerator.process_index // self.get_tp_size()  # tensor-parallel neighbours have the same pairs
        if isinstance(dataset, PreparedStream):
            stream = PairStream(dataset.rows, batching, process_index=share)
            return self._loader(stream, batch_size=None, num_workers=min(args.dataloader_num_workers, 1))
        drop_last = args.dataloader_drop_last
        sampler = PairBatchSampler(dataset["length"], batching, process_index=share, drop_last=drop_last)
        return self._loader(dataset, batch_sampler=sampler)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        # transformers would order evaluations as it orders training; predictions belong to rows, in the rows' order.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """Of an evaluation, as transformers makes it; on several processes divided such that no pair is evaluated twice."""
        processes = self.accelerator.num_processes
        if processes == 1:
            return super()._get_dataloader(dataset, *args, **kwargs)
        batching = Batching(self.args.per_device_eval_batch_size, strategy="sequential", num_processes=processes)
        sampler = PairBatchSampler(dataset["length"], batching, process_index=self.accelerator.process_index)
        return self._loader(dataset, batch_sampler=sampler)

    def _loader(self, dataset: Any, **batches: Any) -> DataLoader:
        args = self.args
        batches.setdefault("num_workers", args.dataloader_num_workers)
        return DataLoaderShard(
            dataset,
            device=self.accelerator.device,
            collate_fn=self.data_collator,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
            _non_blocking=self.accelerator.non_blocking,
            **batches,
        )

    def _gather(self, objects: list[Any]) -> list[Any]:
        """All processes' objects, in the order of the processes."""
        return gather_object(objects) if self.accelerator.num_processes > 1 else objects

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """All processes' rows, which need not be as many on each."""
        return torch.cat(self._gather([rows.cpu()])).to(rows.device)

    def datasets(self) -> list[Any]:
        """All datasets that there are; of a stream, its first pairs."""
        return looked_at(self.train_dataset, self.eval_dataset)


def looked_at(train_dataset: Any, eval_dataset: Any) -> list[Any]:
    """The datasets that there are; of a stream, its first pairs. Evaluation datasets may be several, by name."""
    found = [dataset for dataset in (train_dataset, *by_name(eval_dataset).values()) if dataset is not None]
    return [dataset.sample if isinstance(dataset, PreparedStream) else dataset for dataset in found]
