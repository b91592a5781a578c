"""The handle of a data set: made on the driver, read by every rank. Runs in: every process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from horovodrunner import validation as checked
from horovodrunner.data.batches import Batches, ReadOptions, own_rank_and_size
from horovodrunner.data.columns import Column
from horovodrunner.data.formats import arrow_batches, arrow_schema, numpy_batches
from horovodrunner.data.steps import Remainder
from horovodrunner.data.stored import BlockReader
from horovodrunner.errors import ArgumentTypeError, ArgumentValueError, DataError

if TYPE_CHECKING:
    import pyarrow as pa
    import tensorflow as tf

    from horovodrunner.data.torch_batches import TorchBatches

__all__ = ["SHUFFLE_WINDOW", "DataSet"]

SHUFFLE_WINDOW = 256 * 2**20
"""Rows are mixed within about so many consecutive bytes, unless the caller says otherwise."""


class DataSet:
    """The rows of a DataFrame, stored where every rank can read them.

    Made by :func:`horovodrunner.data.from_dataframe`. It is small when pickled: training code gets
    it as an argument or a closure variable. In a ``with`` block it is deleted at the end.

    Every way to read takes the same options:

    batch_size : int
        Rows a batch of one rank has.
    shuffle : bool
        Whether rows come in random order: another one each epoch, the same on every machine. The
        default is the DataFrame's order.
    seed, epoch : int
        Choose the random order.
    remainder : {"drop", "pad", "split", "uneven"}
        What becomes of rows that fill no whole batch of all ranks. They are left out, or the last
        batch is filled up with rows from the epoch's beginning, or they are split into a shorter
        last batch. When fewer of them are left than there are ranks, ``"split"`` gives the same row
        to several ranks, and with ``"uneven"`` some ranks have no last batch (they call
        ``hvd.join()``).
    columns : sequence of str, optional
        Read these columns only.
    rank, size : int, optional
        Which part to read, of how many; by default this process's rank and the number of ranks.
    batch_transform : callable, optional
        Is called with each batch as NumPy arrays (Arrow tables for :meth:`arrow`).
    threads : int
        How many threads call it ahead of time.
    shuffle_window : int
        Bytes of consecutive blocks within which rows are mixed. Nothing of that size is held in
        memory, but the window is read in random order, so it should fit in the page cache.

    Each iteration is one epoch, the next one begins with another ``epoch``. ``state_dict()`` and
    ``load_state_dict()`` of what they return go on in the middle of an epoch, with any number of
    ranks. All raise ConfigurationError if an option has no valid value, and DataError if there are
    too few rows for the ranks, or the data set cannot be read.
    """

    def __init__(
        self,
        location: str,
        rows: int,
        columns: tuple[Column, ...],
        on_delete: Callable[[], None] | None = None,
    ) -> None:
        self._location = location
        self._rows = rows
        self._columns = columns
        self._on_delete = on_delete

    def __len__(self) -> int:
        """Count the rows."""
        return self._rows

    def __repr__(self) -> str:
        return f"DataSet({self._rows:,} rows, {len(self._columns)} columns, at {self._location})"

    def __reduce__(self) -> tuple[Any, ...]:
        return DataSet, (self._location, self._rows, self._columns)

    def __enter__(self) -> DataSet:
        return self

    def __exit__(self, *error: object) -> None:
        self.delete()

    @property
    def location(self) -> str:
        """Directory or URL where it is stored."""
        return self._location

    @property
    def schema(self) -> pa.Schema:
        """What :meth:`arrow` gives; arrays of one length are fixed-size lists.

        Fields of structs have dots in their names; they are dicts in other batches.
        """
        return arrow_schema(self._columns)

    def delete(self) -> None:
        """Delete what was stored; later reading fails. Deleting twice does nothing.

        Raises
        ------
        DataError
            In another process than the driver that stored it.
        """
        if self._on_delete is None:
            raise DataError(
                f"{self!r} was stored by another process, the driver: it alone deletes it"
            )
        self._on_delete()

    def numpy(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        remainder: Remainder = "drop",
        columns: Sequence[str] | None = None,
        rank: int | None = None,
        size: int | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        threads: int = 0,
        shuffle_window: int = SHUFFLE_WINDOW,
    ) -> Batches[dict[str, Any]]:
        """Read batches of NumPy arrays; the parameters are described at :class:`DataSet`.

        Returns
        -------
        Batches
            Iterable of dicts: arrays of shape ``(batch, ...)`` by column name, which may be changed
            in place. Arrays of different lengths are a :class:`Ragged`; strings and bytes are
            objects.

        Examples
        --------
        >>> import pyarrow as pa
        >>> from horovodrunner import data
        >>> with data.from_arrow(pa.table({"x": range(5)})) as numbers:
        ...     [batch["x"].tolist() for batch in numbers.numpy(batch_size=2)]
        [[0, 1], [2, 3]]
        """
        part = self._rank_and_size(rank, size)
        options = ReadOptions(*part, batch_size, shuffle, seed, epoch, remainder, shuffle_window)
        reader = self._reader(columns)
        return Batches(reader, options, numpy_batches, transform=batch_transform, threads=threads)

    def arrow(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        remainder: Remainder = "drop",
        columns: Sequence[str] | None = None,
        rank: int | None = None,
        size: int | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        threads: int = 0,
        shuffle_window: int = SHUFFLE_WINDOW,
    ) -> Batches[pa.Table]:
        """Read batches that are Arrow tables with the columns of :attr:`schema`.

        The parameters are described at :class:`DataSet`.
        """
        part = self._rank_and_size(rank, size)
        options = ReadOptions(*part, batch_size, shuffle, seed, epoch, remainder, shuffle_window)
        reader = self._reader(columns)
        return Batches(reader, options, arrow_batches, transform=batch_transform, threads=threads)

    def torch(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        remainder: Remainder = "drop",
        columns: Sequence[str] | None = None,
        rank: int | None = None,
        size: int | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        threads: int = 0,
        shuffle_window: int = SHUFFLE_WINDOW,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate_fn: Callable[[Any], Any] | None = None,
        **loader: Any,
    ) -> TorchBatches:
        """Read batches of torch tensors; further parameters are described at :class:`DataSet`.

        Parameters
        ----------
        num_workers
            How many processes make batches; 0: this one does.
        pin_memory
            Whether batches are in memory that a GPU copies from directly.
        collate_fn
            Called with each batch, a dict of tensors.
        **loader
            Further arguments of ``torch.utils.data.DataLoader``, ``prefetch_factor`` say.

        Returns
        -------
        TorchBatches
            Iterable of dicts: tensors of shape ``(batch, ...)`` by column name. Dates are days
            since 1970, timestamps microseconds (int64); strings and bytes are lists. It is also an
            ``IterableDataset``, for a DataLoader of your own with ``batch_size=None``; with
            ``num_workers`` its processes begin anew in each pass, so set ``epoch`` before each.
        """
        from horovodrunner.data.torch_batches import TorchBatches

        part = self._rank_and_size(rank, size)
        options = ReadOptions(*part, batch_size, shuffle, seed, epoch, remainder, shuffle_window)
        reader = self._reader(columns)
        num_workers = checked.integer("num_workers", num_workers, at_least=0)
        pin_memory = checked.boolean("pin_memory", pin_memory)
        if num_workers or pin_memory or loader:
            loader = {"num_workers": num_workers, "pin_memory": pin_memory, **loader}
        return TorchBatches(
            reader,
            options,
            transform=batch_transform,
            threads=threads,
            collate_fn=collate_fn,
            loader=loader,
        )

    def tf(
        self,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        remainder: Remainder = "drop",
        columns: Sequence[str] | None = None,
        rank: int | None = None,
        size: int | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        threads: int = 0,
        shuffle_window: int = SHUFFLE_WINDOW,
        prefetch: int = 2,
        state: dict[str, int] | None = None,
    ) -> tf.data.Dataset:
        """Read batches as a TensorFlow dataset, which Keras takes on any backend.

        Further parameters are described at :class:`DataSet`.

        Parameters
        ----------
        prefetch
            How many batches are made ahead; 0: none, for a dataset that you repeat and prefetch
            yourself, in this order.
        state
            ``{"epoch": ..., "position": ...}`` to go on from: rows that all ranks have taken.

        Returns
        -------
        tf.data.Dataset
            Dicts of tensors of shape ``(batch, ...)``, one element per batch; arrays of different
            lengths are ragged tensors. ``.map(lambda row: (row["features"], row["label"]))`` makes
            what ``model.fit`` takes.
        """
        from horovodrunner.data.tf_dataset import tf_dataset

        part = self._rank_and_size(rank, size)
        options = ReadOptions(*part, batch_size, shuffle, seed, epoch, remainder, shuffle_window)
        reader = self._reader(columns)
        batches: Batches[dict[str, Any]] = Batches(
            reader, options, numpy_batches, transform=batch_transform, threads=threads
        )
        if state is not None:
            batches.load_state_dict(state)
        return tf_dataset(batches, checked.integer("prefetch", prefetch, at_least=-1))

    def _rank_and_size(self, rank: int | None, size: int | None) -> tuple[int, int]:
        if (rank is None) != (size is None):
            raise ArgumentValueError(
                f"rank={rank!r}, size={size!r}: give both, or none for this process's own"
            )
        if rank is None or size is None:
            return own_rank_and_size()
        size = checked.integer("size", size, at_least=1)
        rank = checked.integer("rank", rank, at_least=0)
        if rank >= size:
            raise ArgumentValueError(f"rank={rank}: with size={size} ranks go from 0 to {size - 1}")
        return rank, size

    def _reader(self, columns: Sequence[str] | None) -> BlockReader:
        """Open the data set for some columns; a struct's name chooses all its fields."""
        if columns is None:
            return BlockReader(self.location)
        columns = checked.names("columns", columns)
        if not columns:
            raise ArgumentTypeError("columns=[]: name at least one, or leave it out for all")
        names = [each.name for each in self._columns]
        tops = [each.path[0] for each in self._columns]
        for name in columns:
            if name not in names and name not in tops:
                raise ArgumentValueError(
                    f"columns={columns!r}: there is no column {name!r}; "
                    f"there are {', '.join(names)}"
                )
        wanted = [c.name for c in self._columns if c.name in columns or c.path[0] in columns]
        return BlockReader(self.location, wanted)
