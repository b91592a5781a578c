"""Petastorm's names: the converter over a data set, the Parquet reader, and the package's place."""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("torch")

import torch

from horovodrunner import data
from horovodrunner.compat.petastorm import TransformSpec, make_batch_reader, make_reader
from horovodrunner.compat.petastorm.pytorch import BatchedDataLoader, DataLoader
from horovodrunner.compat.petastorm.reader import without_file_scheme
from horovodrunner.compat.petastorm.spark import SparkDatasetConverter, make_spark_converter
from horovodrunner.compat.petastorm.transform import edit_field
from horovodrunner.errors import ConfigurationError, DataError
from tests import processes

ROOT = Path(__file__).resolve().parents[2]
ROWS = 21


def table(rows: int = ROWS) -> pa.Table:
    features = [[float(row), row + 0.5] for row in range(rows)]
    return pa.table(
        {
            "features": pa.array(features, pa.list_(pa.float32())),
            "label": pa.array(range(rows), pa.int64()),
            "name": [f"n{row}" for row in range(rows)],
        }
    )


@pytest.fixture(scope="module")
def converter() -> Iterator[SparkDatasetConverter]:
    with data.from_arrow(table()) as stored:
        yield SparkDatasetConverter(stored)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """28 rows in two files, six row groups."""
    pq.write_table(table(), tmp_path / "a.parquet", row_group_size=5)
    pq.write_table(table(28).slice(21), tmp_path / "b.parquet")
    return tmp_path


def labels(converter: SparkDatasetConverter, **options: Any) -> list[list[int]]:
    options = {"batch_size": 4, "num_epochs": 1, "shuffle_row_groups": False, **options}
    with converter.make_torch_dataloader(**options) as loader:
        return [batch["label"].tolist() for batch in loader]


class TestConverter:
    def test_it_knows_its_rows_and_travels_without_them(
        self, converter: SparkDatasetConverter
    ) -> None:
        assert len(converter) == converter.dataset_size == ROWS
        assert converter.cache_dir_url.startswith("file:///")
        text = pickle.dumps(converter)
        assert len(text) < 1000
        copy = pickle.loads(text)
        assert labels(copy) == labels(converter)
        with pytest.raises(DataError, match="driver"):
            copy.delete()

    def test_deleting_it_deletes_the_files(self, tmp_path: Path) -> None:
        own = SparkDatasetConverter(data.from_arrow(table(), tmp_path))
        own.delete()
        own.delete()
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(DataError, match="deleted"):
            labels(own)

    def test_without_shards_each_row_comes_once_and_the_last_batch_is_short(
        self, converter: SparkDatasetConverter
    ) -> None:
        found = labels(converter)
        assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15],
                         [16, 17, 18, 19], [20]]  # fmt: skip
        assert labels(converter, num_epochs=2) == found * 2

    @pytest.mark.parametrize("shards", [2, 3, 4])
    @pytest.mark.parametrize("rows", [4, 16, 17, 21, 24])
    def test_all_shards_get_as_many_batches_and_all_rows(self, rows: int, shards: int) -> None:
        with data.from_arrow(table(rows)) as stored:
            own = SparkDatasetConverter(stored)
            found = [
                labels(own, batch_size=2, cur_shard=shard, shard_count=shards)
                for shard in range(shards)
            ]
            assert {len(batches) for batches in found} == {-(-rows // (2 * shards))}
            seen = [row for batches in found for batch in batches for row in batch]
            assert set(seen) == set(range(rows))
            assert len(seen) < rows + shards

    def test_without_an_end_every_batch_is_full(self, converter: SparkDatasetConverter) -> None:
        with converter.make_torch_dataloader(shuffle_row_groups=False) as loader:
            assert len(next(iter(loader))["label"]) == 32  # more than there are rows
        with converter.make_torch_dataloader(
            batch_size=4, cur_shard=1, shard_count=2, shuffle_row_groups=False
        ) as loader:
            batches = iter(loader)
            found = [next(batches)["label"].tolist() for _ in range(7)]
        assert found[:3] == [[4, 5, 6, 7], [12, 13, 14, 15], [20, 0, 1, 2]]
        assert [len(batch) for batch in found] == [4] * 7
        assert found[3:6] == found[:3]  # the next pass
        assert list(batches) == []  # the with block ended it

    def test_each_call_has_another_order_that_the_shards_agree_on(
        self, converter: SparkDatasetConverter
    ) -> None:
        shards = [pickle.loads(pickle.dumps(converter)) for _ in range(2)]
        seen = []
        for _ in range(2):
            found = [
                labels(own, cur_shard=shard, shard_count=2, shuffle_row_groups=True)
                for shard, own in enumerate(shards)
            ]
            rows = [row for batches in found for batch in batches for row in batch]
            assert sorted(set(rows)) == list(range(ROWS))
            seen.append(rows)
            # what one shard reads beside that changes nothing
            labels(shards[0], shuffle_row_groups=True)
        assert seen[0] != seen[1]
        once, again = (labels(converter, seed=5, shuffle_row_groups=True) for _ in range(2))
        assert once == again != labels(converter, seed=6, shuffle_row_groups=True)
        assert labels(converter, shuffling_queue_capacity=10) != labels(converter)

    def test_arguments_of_petastorm_without_effect_are_taken(
        self, converter: SparkDatasetConverter
    ) -> None:
        assert labels(
            converter,
            workers_count=2,
            reader_pool_type="dummy",
            results_queue_size=20,
            cache_type="null",
            hdfs_driver="libhdfs",
            storage_options={},
            zmq_copy_buffers=True,
        ) == labels(converter)
        assert labels(converter, shard_seed=3, shuffle_row_groups=True) == labels(
            converter, seed=3, shuffle_row_groups=True
        )

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"cur_shard": 0}, "shard_count=None: give both"),
            ({"cur_shard": 2, "shard_count": 2}, "go from 0 to 1"),
            ({"cur_shard": "0", "shard_count": 2}, "cur_shard='0': it must be an int, got str"),
            ({"num_epochs": 0}, "num_epochs=0: it must be at least 1"),
            ({"batch_size": 0}, "batch_size"),
            ({"workers_count": 0}, "workers_count=0"),
            ({"reader_pool_type": "fork"}, "'thread', 'process' or 'dummy'"),
            ({"filters": [("label", "=", 1)]}, "df.filter"),
            ({"predicate": object()}, "df.filter"),
            ({"schema_fields": "label"}, "give a list"),
            ({"schema_fields": ["la"]}, "matches no column; there are features, label, name"),
            ({"transform_spec": print}, "give a TransformSpec"),
            ({"shuffel": True}, "shuffel: there is no such argument"),
        ],
    )
    def test_what_cannot_be_followed_is_refused(
        self, converter: SparkDatasetConverter, options: dict[str, Any], text: str
    ) -> None:
        for make in (converter.make_torch_dataloader, converter.make_tf_dataset):
            with pytest.raises(ConfigurationError) as caught:
                make(**options).__enter__()
            assert text in str(caught.value)

    def test_a_shard_that_is_not_the_rank_is_logged(
        self,
        converter: SparkDatasetConverter,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
        monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
        with caplog.at_level(logging.WARNING):
            labels(converter, cur_shard=1, shard_count=2)
            assert caplog.messages == []
            labels(converter)
        [line] = caplog.messages
        assert "cur_shard=None" in line
        assert "rank 1 " in line
        assert "cur_shard=hvd.rank()" in line


def image(rows: Any) -> Any:
    """Preprocess as notebooks do: one row after the other."""
    rows["image"] = rows["features"].map(lambda x: np.tile(x, (3, 1)))
    rows["name"] = rows["name"].str.upper()
    return rows.drop(labels=["features"], axis=1)


IMAGE = [edit_field("image", np.float64, (3, 2))]


class TestTransformSpec:
    def test_batches_are_data_frames_to_it(self, converter: SparkDatasetConverter) -> None:
        spec = TransformSpec(image, edit_fields=IMAGE, selected_fields=["image", "label", "name"])
        with converter.make_torch_dataloader(
            batch_size=8, num_epochs=1, shuffle_row_groups=False, transform_spec=spec
        ) as loader:
            batches = list(loader)
        assert [len(batch["label"]) for batch in batches] == [8, 8, 5]
        assert list(batches[0]) == ["image", "label", "name"]
        assert batches[1]["name"][0] == "N8"
        assert batches[1]["image"].dtype == torch.float64
        assert batches[1]["image"].shape == (8, 3, 2)
        assert batches[1]["image"][1].tolist() == [[9.0, 9.5]] * 3
        batches[0]["label"].add_(1)

    def test_columns_are_removed_without_a_function(self, converter: SparkDatasetConverter) -> None:
        spec = TransformSpec(removed_fields=["name", "features"])
        with converter.make_torch_dataloader(num_epochs=1, transform_spec=spec) as loader:
            assert [list(batch) for batch in loader] == [["label"]]

    @pytest.mark.parametrize(
        ("spec", "text"),
        [
            (TransformSpec(image, IMAGE), "removed_fields or selected_fields"),
            (TransformSpec(lambda rows: rows[rows.label > 2]), "got 8 rows and returned 5"),
            (
                TransformSpec(image, [edit_field("image", "f4", (6,))], ["features"]),
                "values of the shape (3, 2), and edit_fields says (6,)",
            ),
            (
                TransformSpec(lambda rows: rows.assign(
                    features=[np.zeros(2 + row % 2) for row in rows.label])),
                "the shapes (2,), (3,)",
            ),
        ],
    )  # fmt: skip
    def test_a_function_that_does_something_else_is_told(
        self, converter: SparkDatasetConverter, spec: TransformSpec, text: str
    ) -> None:
        with (
            converter.make_torch_dataloader(
                batch_size=8, shuffle_row_groups=False, transform_spec=spec
            ) as loader,
            pytest.raises(DataError) as caught,
        ):
            next(iter(loader))
        assert text in str(caught.value)

    def test_contradictions_are_refused(self, converter: SparkDatasetConverter) -> None:
        with pytest.raises(ConfigurationError, match="give one of them"):
            TransformSpec(removed_fields=["a"], selected_fields=["b"])
        spec = TransformSpec(selected_fields=["label", "lable"])
        with pytest.raises(ConfigurationError, match="'lable', and there is no such column"):
            converter.make_torch_dataloader(transform_spec=spec)

    def test_dates_bytes_structs_and_uneven_arrays_reach_it(self) -> None:
        rows = {
            "day": pa.array([0, 1], pa.date32()),
            "raw": [b"a\0", b"b"],
            "point": [{"x": 1}, {"x": 2}],
            "tokens": [[1], [2, 3]],
        }
        seen: list[Any] = []

        def look(rows: Any) -> Any:
            seen.append(rows.copy())
            rows["tokens"] = rows["tokens"].map(lambda each: np.resize(each, 2))
            return rows[["raw", "tokens"]]

        spec = TransformSpec(
            look, [edit_field("tokens", np.int64, (2,))], removed_fields=["day", "point"]
        )
        with (
            data.from_arrow(pa.table(rows)) as stored,
            SparkDatasetConverter(stored).make_torch_dataloader(
                num_epochs=1, shuffle_row_groups=False, transform_spec=spec
            ) as loader,
        ):
            [batch] = loader
        assert [str(day) for day in seen[0]["day"]] == ["1970-01-01", "1970-01-02"]
        assert list(seen[0]["point.x"]) == [1, 2]
        assert batch["raw"] == [b"a\0", b"b"]
        assert batch["tokens"].tolist() == [[1, 1], [2, 3]]


@pytest.mark.heavy
class TestTensorFlow:
    def test_elements_are_namedtuples(self, converter: SparkDatasetConverter) -> None:
        with converter.make_tf_dataset(batch_size=4, shuffle_row_groups=False) as dataset:
            pairs = dataset.map(lambda row: (row.features, row.label))
            assert pairs.element_spec[0].shape == (4, 2)
            assert pairs.cardinality() == -1
            found = [label.numpy().tolist() for _, label in pairs.take(7)]
            assert next(iter(dataset)).name.numpy().tolist() == [b"n0", b"n1", b"n2", b"n3"]
        assert found[5:] == [[20, 0, 1, 2], [0, 1, 2, 3]]

    def test_epochs_and_shards(self, converter: SparkDatasetConverter) -> None:
        for shard, last in enumerate(([16, 17, 18], [19, 20])):
            with converter.make_tf_dataset(
                batch_size=4, num_epochs=2, cur_shard=shard, shard_count=2,
                shuffle_row_groups=False, schema_fields=["label"], prefetch=1,
            ) as dataset:  # fmt: skip
                found = [row.label.numpy().tolist() for row in dataset]
            assert len(found) == 6
            assert found[2] == found[5] == last

    def test_batches_are_made_ahead_after_they_are_repeated(
        self, converter: SparkDatasetConverter
    ) -> None:
        """Each pass would take a buffer of its own from TensorFlow's budget otherwise."""
        for num_epochs in (None, 2):
            for prefetch in (None, 3):
                with converter.make_tf_dataset(prefetch=prefetch, num_epochs=num_epochs) as dataset:
                    names, found = [], dataset
                    while found is not None:
                        names.append(type(found).__name__)
                        found = next(iter(found._inputs()), None)
                assert "Prefetch" in names[0]
                assert "Repeat" in names[1]
                assert not [name for name in names[1:] if "Prefetch" in name]

    def test_a_digest_of_rows_without_end_fails_instead_of_never_ending(
        self, converter: SparkDatasetConverter, parquet: Path
    ) -> None:
        """MLflow's autologging computes one, of whatever the dataset was made into."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.tensorflow_dataset import from_tensorflow

        from horovodrunner.compat.petastorm.tf_utils import make_petastorm_dataset

        def digest_of(rows: Any) -> str:
            return str(from_tensorflow(rows, CodeDatasetSource(tags={})).digest)

        with (
            converter.make_tf_dataset(schema_fields=["features", "label"]) as rows,
            make_batch_reader(parquet.as_uri(), ["label"], num_epochs=None) as reader,
        ):
            pairs = rows.map(lambda row: (row.features, row.label))
            for endless in (
                rows,
                pairs,
                pairs.unbatch().batch(4).prefetch(1),
                pairs.filter(lambda features, label: True),
                make_petastorm_dataset(reader).map(lambda row: row.label).unbatch(),
                converter._stored.tf(4, columns=["label"]).repeat(),
            ):
                with pytest.raises(Exception, match=r"has no end.*log_datasets=False"):
                    digest_of(endless)
            assert next(iter(pairs))[1].shape == (32,)
            assert digest_of(pairs.take(3))
        with converter.make_tf_dataset(num_epochs=2, schema_fields=["label"]) as rows:
            assert digest_of(rows)

    def test_a_worker_refuses_the_digest_of_any_dataset_without_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also of one whose rows come from elsewhere, as in Horovod's own examples."""
        import tensorflow as tf
        from mlflow.data import tensorflow_dataset
        from mlflow.data.code_dataset_source import CodeDatasetSource

        from horovodrunner.processes.worker import notices

        name = "_compute_tensorflow_dataset_digest"
        original = getattr(tensorflow_dataset.TensorFlowDataset, name)
        monkeypatch.setattr(tensorflow_dataset.TensorFlowDataset, name, original)
        notices.watch(tensorflow_dataset)
        rows = tf.data.Dataset.range(8)
        source = CodeDatasetSource(tags={})
        for features, targets in (
            (rows.repeat().shuffle(8).batch(2), None),
            (rows.repeat().filter(lambda row: True), None),
            (rows, rows.repeat()),
        ):
            with pytest.raises(DataError, match=r"has no end.*log_datasets=False"):
                tensorflow_dataset.from_tensorflow(features, source, targets)
        assert tensorflow_dataset.from_tensorflow(rows.repeat(2), source, rows).digest

    def test_transformed_rows(self, converter: SparkDatasetConverter) -> None:
        spec = TransformSpec(image, edit_fields=IMAGE, selected_fields=["label", "image"])
        with converter.make_tf_dataset(
            batch_size=8, num_epochs=1, shuffle_row_groups=False, transform_spec=spec
        ) as dataset:
            rows = list(dataset)
        assert rows[0]._fields == ("label", "image")
        assert [row.image.shape for row in rows] == [(8, 3, 2), (8, 3, 2), (5, 3, 2)]

    def test_names_that_no_namedtuple_has(self) -> None:
        with data.from_arrow(pa.table({"a b": [1]})) as stored:
            own = SparkDatasetConverter(stored)
            with pytest.raises(DataError, match="withColumnRenamed"):
                own.make_tf_dataset().__enter__()
            with own.make_torch_dataloader(num_epochs=1) as loader:
                assert [batch["a b"].tolist() for batch in loader] == [[1]]


class TestBatchReader:
    @pytest.mark.parametrize("shards", [1, 2, 3, 8])
    def test_shards_have_as_many_rows_and_all_of_them(self, parquet: Path, shards: int) -> None:
        found = []
        for shard in range(shards):
            with make_batch_reader(
                parquet.as_uri(), ["label"], cur_shard=shard, shard_count=shards
            ) as reader:
                found.append([row for batch in reader for row in batch.label.tolist()])
            assert len(reader) == len(found[-1])
        assert {len(rows) for rows in found} == {-(-28 // shards)}
        assert {row for rows in found for row in rows} == set(range(28))
        with pytest.raises(DataError, match="28 rows, fewer than the 29 shards"):
            make_batch_reader(parquet.as_uri(), cur_shard=0, shard_count=29)

    def test_row_groups_are_namedtuples_of_arrays(self, parquet: Path) -> None:
        with make_batch_reader(
            parquet.as_uri(), num_epochs=2, shuffle_row_groups=False, workers_count=2
        ) as reader:
            batches = list(reader)
            assert [len(batch.label) for batch in batches] == [5, 5, 5, 5, 1, 7] * 2
            assert batches[1].features.tolist()[0] == [5.0, 5.5]
            assert batches[1].name.tolist()[0] == "n5"
            assert batches[0]._fields == ("features", "label", "name")
            reader.reset()
            assert next(reader).label.tolist() == [0, 1, 2, 3, 4]
            with pytest.raises(DataError, match="not before"):
                reader.reset()
        with pytest.raises(DataError, match="stopped"):
            next(reader)

    def test_files_partitions_and_other_file_systems(self, parquet: Path) -> None:
        (parquet / "hive" / "day=3").mkdir(parents=True)
        (parquet / "b.parquet").rename(parquet / "hive" / "day=3" / "b.parquet")
        with make_batch_reader([(parquet / "a.parquet").as_uri()]) as reader:
            assert len(reader) == ROWS
        with make_batch_reader(str(parquet / "hive"), ["label", "day"]) as reader:
            assert next(reader).day.tolist() == [3] * 7
        memory = fsspec.filesystem("memory")
        memory.pipe("/petastorm/a.parquet", (parquet / "a.parquet").read_bytes())
        try:
            with make_batch_reader("memory://petastorm") as reader:
                assert len(reader) == ROWS
            with make_batch_reader("/petastorm", filesystem=memory) as reader:
                assert len(reader) == ROWS
        finally:
            memory.rm("/petastorm", recursive=True)

    def test_a_transform(self, parquet: Path) -> None:
        spec = TransformSpec(image, IMAGE, selected_fields=["label", "image"])
        with make_batch_reader(parquet.as_uri(), transform_spec=spec, shuffle_rows=True) as reader:
            batch = next(reader)
        assert batch.image.shape[1:] == (3, 2)
        assert batch.image[:, 0, 0].tolist() == batch.label.tolist()

    def test_a_seed_fixes_the_sequence_and_not_each_group(self, tmp_path: Path) -> None:
        table = pa.table({"row": range(120)})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=40)

        def passes(seed: int | None, pool: str = "thread") -> list[list[int]]:
            with make_batch_reader(
                tmp_path.as_uri(), num_epochs=2, seed=seed, reader_pool_type=pool,
                shuffle_rows=True, shuffle_row_groups=False,
            ) as reader:  # fmt: skip
                found = [batch.row.tolist() for batch in reader]
                reader.reset()
                return found + [batch.row.tolist() for batch in reader]

        found = passes(7)
        within = {tuple(row % 40 for row in rows) for rows in found}
        assert len(within) == len(found) == 12  # another permutation each, in each epoch and pass
        assert all(sorted(rows) == list(range(min(rows), min(rows) + 40)) for rows in found)
        assert passes(7, "dummy") == found  # whatever the threads
        assert passes(8) != found
        assert passes(None) != passes(None)

    def test_a_seed_fixes_what_the_loaders_mix(self, parquet: Path) -> None:
        def passes(seed: int | None, loader: Any) -> list[list[int]]:
            reader = make_batch_reader(parquet.as_uri(), ["label"], seed=seed)
            with loader(reader, batch_size=28, shuffling_queue_capacity=100) as mixed:
                return [batch["label"].tolist() for _ in range(2) for batch in mixed]

        for loader in (DataLoader, BatchedDataLoader):
            first, second = passes(3, loader)
            assert first != second
            assert passes(3, loader) == [first, second]
            assert passes(4, loader) != [first, second]

    def test_what_cannot_be_read_is_told(self, parquet: Path) -> None:
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            make_batch_reader((parquet / "nowhere").as_uri())
        with pytest.raises(ConfigurationError, match="a URL, or a list"):
            make_batch_reader(7)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="make_batch_reader"):
            make_reader(parquet.as_uri())

    def test_the_loader_makes_tensors(self, parquet: Path) -> None:
        columns = ["features", "label"]
        with DataLoader(
            make_batch_reader(parquet.as_uri(), columns, shuffle_row_groups=False), batch_size=8
        ) as loader:
            batches = list(loader)
            assert [batch["label"].tolist() for batch in batches][1] == list(range(8, 16))
            assert [len(batch["label"]) for batch in batches] == [8, 8, 8, 4]
            assert batches[0]["features"].dtype == torch.float32
            assert len(list(loader)) == 4  # begins anew

    def test_the_loader_mixes_rows_and_collates(self, parquet: Path) -> None:
        mixed = DataLoader(
            make_batch_reader(parquet.as_uri(), ["label"]),
            batch_size=8,
            collate_fn=lambda rows: [int(row["label"]) for row in rows],
            shuffling_queue_capacity=100,
        )
        with mixed as loader:
            batches = list(loader)
        found = [row for batch in batches for row in batch]
        assert sorted(found) == list(range(28)) != found
        with (
            BatchedDataLoader(
                make_batch_reader(parquet.as_uri(), ["label"]), batch_size=8, transform_fn=list
            ) as loader,
        ):
            running: Any = iter(loader)
            assert isinstance(next(running)["label"], list)
            with pytest.raises(DataError, match="being iterated"):
                next(iter(loader))
            running.close()
        with (
            DataLoader(make_batch_reader(parquet.as_uri())) as loader,
            pytest.raises(DataError, match="column 'name'"),
        ):
            next(iter(loader))

    def test_another_loader_over_the_converter(self, converter: SparkDatasetConverter) -> None:
        for shard in range(2):
            with converter.make_torch_dataloader(
                batch_size=4, num_epochs=1, cur_shard=shard, shard_count=2,
                data_loader_fn=BatchedDataLoader, schema_fields=["label"],
            ) as loader:  # fmt: skip
                assert isinstance(loader, BatchedDataLoader)
                assert [len(batch["label"]) for batch in loader] == [4, 4, 4]
                assert len(list(loader)) == 3

    def test_a_dataset_of_row_groups(self, parquet: Path) -> None:
        from horovodrunner.compat.petastorm.tf_utils import make_petastorm_dataset

        with make_batch_reader(parquet.as_uri(), shuffle_row_groups=False) as reader:
            dataset = make_petastorm_dataset(reader)
            rows = list(dataset.unbatch().batch(10))
            assert [row.label.shape[0] for row in rows] == [10, 10, 8]
            assert rows[0].name.numpy()[3] == b"n3"
            assert rows[0].features.shape == (10, 2)
            assert len(list(dataset)) == 6  # begins anew
        stamps = pa.table(
            {"at": pa.array([1], pa.timestamp("us")), "day": pa.array([1], pa.date32())}
        )
        pq.write_table(stamps, parquet / "c.parquet")
        with make_batch_reader((parquet / "c.parquet").as_uri()) as reader:
            [row] = make_petastorm_dataset(reader)
        assert (row.at.numpy().tolist(), row.day.numpy().tolist()) == ([1000], [86400 * 10**9])


class TestArguments:
    def test_urls(self) -> None:
        assert without_file_scheme("file:///a%20b/c") == "/a b/c"
        assert without_file_scheme("file:/dbfs/c") == "/dbfs/c"
        assert without_file_scheme("dbfs:/c") == "dbfs:/c"
        for url, text in (
            ("dbfs:/c", "on Databricks write the path /dbfs/c"),
            ("C:/c", "a path of Windows"),
            ("s3n://bucket/c", "write s3://bucket/c"),
            (["", "/c"], "is empty: give at least one URL"),
        ):
            with pytest.raises(ConfigurationError, match=text):
                make_batch_reader(url)
        with pytest.raises(ConfigurationError, match="file:///tmp/x"):
            without_file_scheme("file://tmp/x")

    def test_make_spark_converter_checks_before_spark_is_asked(self) -> None:
        with pytest.raises(ConfigurationError, match="compression_codec='zip'"):
            make_spark_converter(None, compression_codec="zip")
        with pytest.raises(ConfigurationError, match="give a Spark DataFrame"):
            make_spark_converter(table())


def python(script: str, *path: Path) -> str:
    """Run a script with such a path; give all output."""
    done = processes.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))},
        cwd="/",
        stdout=processes.PIPE,
        stderr=processes.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


class TestTopLevelName:
    WHOSE = "import petastorm; print(getattr(petastorm, 'WHOSE', 'ours'))"

    @pytest.fixture
    def real(self, tmp_path: Path) -> Path:
        package = tmp_path / "site" / "petastorm"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("from petastorm.inner import WHOSE\n")
        (package / "inner.py").write_text("WHOSE = 'real'\n")
        return package.parent

    def test_it_is_ours_and_the_same_modules(self) -> None:
        script = """
            import sys, json
            from petastorm import TransformSpec, make_batch_reader, make_reader
            from petastorm.spark import SparkDatasetConverter, make_spark_converter
            import petastorm.pytorch, petastorm.tf_utils, petastorm.reader
            import horovodrunner.compat.petastorm.spark as own
            heavy = "pyspark", "torch", "tensorflow", "pandas"
            print(json.dumps({
                "same": petastorm.spark is own and TransformSpec.__module__.startswith("horovodr"),
                "heavy": [name for name in heavy if name in sys.modules],
                "conf": SparkDatasetConverter.PARENT_CACHE_DIR_URL_CONF,
                "module": SparkDatasetConverter.__module__,
            }))
        """
        found = json.loads(python(script, ROOT))
        assert found == {
            "same": True,
            "heavy": [],
            "conf": "petastorm.spark.converter.parentCacheDirUrl",
            "module": "horovodrunner.compat.petastorm.converter",
        }

    def test_an_installed_one_comes_first_wherever_it_is(self, real: Path) -> None:
        assert python(self.WHOSE, real, ROOT) == "real"
        assert python(self.WHOSE, ROOT, real) == "real"
        assert python("import petastorm.inner; print(petastorm.inner.WHOSE)", ROOT, real) == "real"

    def test_an_installed_one_in_the_same_directory_comes_first(self, real: Path) -> None:
        (real / "petastorm.py").write_text((ROOT / "petastorm.py").read_text())
        assert python(self.WHOSE, real, ROOT) == "real"

    def test_a_mere_directory_of_that_name_does_not(self, tmp_path: Path) -> None:
        (tmp_path / "petastorm").mkdir()
        assert python(self.WHOSE, ROOT, tmp_path) == "ours"
        assert python(self.WHOSE, tmp_path, ROOT) == "ours"
