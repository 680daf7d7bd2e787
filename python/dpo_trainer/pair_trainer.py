"""The part of `DPOTrainer` that handles data: tokenised datasets and streams, and the batches of each process."""

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
from .data.account import Account, count_trained_on, hold_out, tokens_of
from .data.prepare import Preparation, PreparedStream, by_name, is_stream, prepare_dataset
from .errors import ConfigError, DataError
from .progress import line_of
from .settings.config import DPOConfig

logger = logging.getLogger("dpo_trainer")


class PairTrainer(Trainer):
    """A trainer with datasets of preference pairs. It has no loss.

    Attributes:
        accounts: for every dataset, what was read and what was left out.
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
            dataset, account = prepare_dataset(dataset, tokenizer, preparation, name=name, line=line_of(args))
            if account.dropped:
                logger.warning(account.describe())
        said = {line for other in self.accounts for line in other.remarks}
        for line in account.remarks:
            if line not in said:
                logger.warning(line)
        self.accounts.append(account)
        return dataset

    def _tokenize_all(self, train: Any, evaluation: Any, args: DPOConfig, tokenizer: Any) -> tuple[Any, Any]:
        """Tokenise both datasets. A dict of evaluation datasets stays a dict. `val_split` takes a part of the training data."""
        if args.val_split is not None:
            check_val_split(given=evaluation is not None, stream=is_stream(train), what="an eval_dataset")
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
        if args.val_split is not None and train is not None:
            train, evaluation = self._split(train, args)
        for account, dataset in zip(reversed(self.accounts), reversed(by_name(evaluation).values()), strict=False):
            account.trained_on, account.prompts_trained_on = count_trained_on(dataset, train)
            kept = f"{account.kept:,}"
            if account.trained_on:
                logger.warning(
                    "%s: %s of %s pairs are training pairs too, so its figures are not held-out figures",
                    account.name,
                    f"{account.trained_on:,}",
                    kept,
                )
            if account.prompts_trained_on:
                logger.info(
                    "%s: %s of %s pairs have the prompt of a training pair, with other answers",
                    account.name,
                    f"{account.prompts_trained_on:,}",
                    kept,
                )
        return train, evaluation

    def _split(self, train: Any, args: DPOConfig) -> tuple[Any, Any]:
        """The pairs to train on, and the pairs that `val_split` holds out. Updates and adds their accounts."""
        seed = args.data_seed if args.data_seed is not None else args.seed
        held_out = hold_out(train, cast(float, args.val_split), seed)
        places = set(held_out)
        evaluation = train.select(held_out)
        train = train.select([place for place in range(len(train)) if place not in places])
        (account,) = self.accounts
        account.held_out, account.tokens = len(evaluation), tokens_of(train)
        self.accounts.append(Account("eval_dataset", len(evaluation), tokens_of(evaluation)))
        logger.info(
            "val_split: %s pairs to train on, %s held out; no prompt is in both",
            f"{len(train):,}",
            f"{len(evaluation):,}",
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
            raise ConfigError("max_steps: must be given with a stream of pairs, since its length is not known")

    def get_train_dataloader(self) -> DataLoader:
        """A loader with the batches of `PairBatchSampler`, which divides them among processes."""
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
        share = self.accelerator.process_index // self.get_tp_size()  # tensor-parallel processes have the same pairs
        if isinstance(dataset, PreparedStream):
            stream = PairStream(dataset.rows, batching, process_index=share)
            return self._loader(stream, batch_size=None, num_workers=min(args.dataloader_num_workers, 1))
        drop_last = args.dataloader_drop_last
        sampler = PairBatchSampler(dataset["length"], batching, process_index=share, drop_last=drop_last)
        return self._loader(dataset, batch_sampler=sampler)

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int] | None:
        # transformers would use the order of training. Predictions must be in the order of the rows.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """The loader of an evaluation: that of transformers, but with several processes no pair is evaluated twice."""
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
        """The objects of all processes, in the order of the processes."""
        return gather_object(objects) if self.accelerator.num_processes > 1 else objects

    def _gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all processes, whose numbers of rows may differ."""
        return torch.cat(self._gather([rows.cpu()])).to(rows.device)

    def datasets(self) -> list[Any]:
        """The training and evaluation datasets. A stream is represented by its first pairs."""
        return looked_at(self.train_dataset, self.eval_dataset)


def looked_at(train_dataset: Any, eval_dataset: Any) -> list[Any]:
    """The datasets that are not None. A stream is represented by its first pairs. `eval_dataset` may be a dict."""
    found = [dataset for dataset in (train_dataset, *by_name(eval_dataset).values()) if dataset is not None]
    return [dataset.sample if isinstance(dataset, PreparedStream) else dataset for dataset in found]


def check_val_split(*, given: bool, stream: bool, what: str) -> None:
    """Raise ConfigError if `val_split` is not possible, because evaluation data are given or the pairs are a stream.

    Args:
        given: whether evaluation data are given.
        stream: whether the pairs are a stream.
        what: name of the evaluation data in the message.
    """
    if given:
        raise ConfigError(f"val_split: {what} is given too; leave one of them out")
    if stream:
        raise ConfigError("val_split: needs all pairs before training; not supported with a stream")
