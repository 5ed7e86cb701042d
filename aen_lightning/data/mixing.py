"""From rows of tokens to shuffled batches of activations: reading a language model, the shuffle buffer,
resuming it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from aen_lightning.data.token_filter import TokenFilter
from aen_lightning.language_model.cut_model import ActivationModel
from aen_lightning.language_model.hook_points import Hook
from aen_lightning.progress import counted, working

Batch = Tensor | dict[str, Tensor]


class MixingBuffer:
    """``sae_lens.training.mixing_buffer``, row for row, with its own random numbers and its content in reach.

    SAELens's generator draws from the global generator, which a prefetching thread would share with training,
    and its content cannot be rebuilt for an exact resume; the order of rows is the same for the same seed.

    Args:
        buffer_size: Rows that set off shuffling and serving.
        batch_size: Rows a batch, at most ``buffer_size``.
        mix_fraction: Share of ``buffer_size`` kept back for the next round, in [0, 1]; 0: no shuffling.
        generator: On the CPU, one permutation drawn each round; None: the global one.

    Raises:
        ValueError: If the buffer cannot hold a batch or ``mix_fraction`` is outside [0, 1].
    """

    def __init__(
        self, buffer_size: int, batch_size: int, mix_fraction: float, generator: torch.Generator | None = None
    ) -> None:
        if buffer_size < batch_size:
            raise ValueError(
                f"buffer_size_tokens must be at least a batch ({batch_size} tokens), got {buffer_size}"
            )
        if not 0 <= mix_fraction <= 1:
            raise ValueError(f"activations_mixing_fraction must be in [0, 1], got {mix_fraction}")
        self.buffer_size, self.batch_size, self.mix_fraction = buffer_size, batch_size, mix_fraction
        self.generator = generator
        self.chunks: list[Tensor] = []

    def push(self, rows: Tensor) -> list[Tensor]:
        """Add rows of shape (n, ...); returns the batches now served, each (batch_size, ...), often none."""
        self.chunks.append(rows)
        if sum(len(chunk) for chunk in self.chunks) < self.buffer_size:
            return []
        stored = torch.cat(self.chunks)
        if self.mix_fraction > 0:
            stored = stored[torch.randperm(len(stored), generator=self.generator).to(stored.device)]
        n_batches = max(1, (len(stored) - int(self.buffer_size * self.mix_fraction)) // self.batch_size)
        served, kept = stored.split([n_batches * self.batch_size, len(stored) - n_batches * self.batch_size])
        # a copy, so that what is kept does not keep the served batches alive
        self.chunks = [kept.clone()]
        return list(served.split(self.batch_size))


class ActivationReader:
    """Reads a language model's activations, those of unwanted tokens left out, and counts tokens.

    Args:
        language_model: Gives the model; called at the first read.
        hooks: Hooks of the model, whose activations are put side by side.
        token_filter: Which tokens to keep; medians of norms are over a model call.
        autocast: Run the model under bfloat16 autocast.
    """

    def __init__(
        self, language_model: Callable[[], ActivationModel], hooks: tuple[Hook, ...], *,
        token_filter: TokenFilter,
        autocast: bool,
    ) -> None:  # fmt: skip
        self.language_model, self.hooks = language_model, hooks
        self.token_filter, self.autocast = token_filter, autocast
        self.widths = [h.d_in for h in hooks]
        self.counts = {"seen": 0, "dropped_special": 0, "dropped_outliers": 0}

    def count(self, tokens: Tensor, n_not_special: int, n_kept: int) -> None:
        """Count the tokens of one model call."""
        self.counts["seen"] += tokens.numel()
        self.counts["dropped_special"] += tokens.numel() - n_not_special
        self.counts["dropped_outliers"] += n_not_special - n_kept

    def kept_positions(self, tokens: Tensor) -> Tensor:
        """Positions in the flattened tokens that are not excluded by token id."""
        return self.token_filter.by_id(tokens.flatten()).nonzero().squeeze(-1)

    def read(self, tokens: Tensor, *, count: bool = False) -> tuple[Tensor, Tensor]:
        """One model call on tokens (prompts, context).

        Returns:
            Raw activations, float32, hook points side by side: (n_kept, sum of d_in); and the positions kept,
            (n_kept,).
        """
        model = self.language_model()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.autocast):
            activations = model.activations(tokens)
        kept = self.kept_positions(tokens).to(model.device)
        n_not_special = len(kept)
        flat = [activations[h.hook_name].flatten(0, 1) for h in self.hooks]
        rows = torch.cat([part[kept.to(part.device)].to(model.device).float() for part in flat], dim=-1)
        inliers = self.token_filter.by_norm(rows.split(self.widths, dim=-1))
        if inliers is not None:
            rows, kept = rows[inliers], kept[inliers]
        if count:
            self.count(tokens, n_not_special, len(kept))
        return rows, kept

    def mean_norms(self, calls: Iterator[Tensor]) -> list[float]:
        """Mean norm of the activations at each hook point over all tokens of ``calls``.

        Raises:
            ValueError: If no token is left.
        """
        sums, n = torch.zeros(len(self.hooks), dtype=torch.float64), 0
        for tokens in counted(calls, "measuring the activations' norm", unit="calls"):
            parts = self.read(tokens)[0].split(self.widths, dim=-1)
            sums += torch.stack([part.norm(dim=-1).double().sum().cpu() for part in parts])
            n += len(parts[0])
        if n == 0:
            raise ValueError(
                "no token is left to estimate the mean norm from: give more data or exclude fewer tokens"
            )
        return (sums / n).tolist()


def shuffled_batches(
    reader: ActivationReader, calls: Iterator[Tensor], buffer: MixingBuffer, *, skip: int = 0
) -> Iterator[Tensor]:
    """Batches of activations (batch_size, sum of d_in) for as long as there are tokens.

    Args:
        reader: Runs the model.
        calls: Tokens (prompts, context) of one model call each.
        buffer: Empty.
        skip: Batches to leave out at the beginning; those that follow are the same, bit for bit, as without
            ``skip``. Without a norm filter this needs the model only for what is still in the buffer then.
    """
    if skip and reader.token_filter.norm_outlier_multiple is None:
        yield from _replay(reader, calls, buffer, skip)
        skip = 0
    elif skip:
        rank_zero_warn(
            f"resuming: the model runs again over the tokens of the first {skip} batches, as "
            "norm_outlier_multiple needs their activations to tell which tokens were left out"
        )
    for tokens in chain(_filling(calls, buffer), calls):
        for rows in buffer.push(reader.read(tokens, count=True)[0]):
            if skip:
                skip -= 1
            else:
                yield rows


def _filling(calls: Iterator[Tensor], buffer: MixingBuffer) -> Iterator[Tensor]:
    """The calls up to the one that fills the buffer, which are minutes of work before the first batch."""
    with working("filling the shuffle buffer", buffer.buffer_size, "tokens") as task:
        for tokens in calls:
            if task.done + tokens.numel() >= buffer.buffer_size:
                break
            yield tokens
            task.done = sum(len(chunk) for chunk in buffer.chunks)
        else:
            return
    yield tokens  # batches come of this one, and filling is over before they do


def _replay(
    reader: ActivationReader, calls: Iterator[Tensor], buffer: MixingBuffer, skip: int
) -> list[Tensor]:
    """Bring a new buffer to where it was after ``skip`` batches, and return those served beyond them.

    The buffer shuffles pairs (call, position) in place of activations; then the model reads the calls that
    are left.
    """
    tokens_of: dict[int, Tensor] = {}
    served: list[Tensor] = []
    call, n_served = 0, 0
    while n_served < skip:
        tokens = tokens_of[call] = next(calls)
        positions = reader.kept_positions(tokens)
        reader.count(tokens, len(positions), len(positions))
        served = buffer.push(torch.stack([torch.full_like(positions, call), positions], dim=1))
        n_served += len(served)
        call += 1
        if served:
            tokens_of = {c: tokens_of[c] for c in torch.cat(buffer.chunks + served)[:, 0].unique().tolist()}
    n_kept = sum(len(chunk) for chunk in buffer.chunks)
    pairs = torch.cat([*buffer.chunks, *served[len(served) - (n_served - skip) :]])
    rows: Tensor | None = None
    for c, tokens in tokens_of.items():
        mine = (pairs[:, 0] == c).nonzero().squeeze(-1)
        if len(mine) == 0:
            continue
        activations, kept = reader.read(tokens)
        row_at = torch.zeros(tokens.numel(), dtype=torch.long).index_copy_(
            0, kept.cpu(), torch.arange(len(kept))
        )
        if rows is None:
            rows = activations.new_empty(len(pairs), activations.shape[-1])
        rows[mine.to(rows.device)] = activations[row_at[pairs[mine, 1]].to(rows.device)]
    if rows is None:  # nothing was left over: mix_fraction 0 and a buffer of whole batches
        buffer.chunks = []
        return []
    buffer.chunks = [rows[:n_kept].clone()]
    return list(rows[n_kept:].split(buffer.batch_size)) if len(rows) > n_kept else []


def in_calls(rows: Iterator[Tensor], prompts: int) -> Iterator[Tensor]:
    """Rows (context,) stacked to (prompts, context), the last ones fewer."""
    while chunk := list(islice(rows, prompts)):
        yield torch.stack(chunk)


class _Batches(IterableDataset[Batch]):
    """Batches from a function that starts an iterator."""

    def __init__(self, start: Callable[[], Iterator[Batch]]) -> None:
        self.start = start

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.start())


def batch_loader(start: Callable[[], Iterator[Batch]]) -> DataLoader[Batch]:
    """A loader of the whole batches that ``start()`` yields, made in this process."""
    # a generator of its own: otherwise each start of a loader draws from the global one
    return DataLoader(_Batches(start), batch_size=None, num_workers=0, generator=torch.Generator())
