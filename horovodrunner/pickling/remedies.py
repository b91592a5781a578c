"""What stays in the process that made it, and what to send instead. Runs in: every process."""

from __future__ import annotations

import re
import types
from typing import Any, NamedTuple

from horovodrunner.formatting import class_names

__all__ = ["Remedy", "remedy_for"]


_PLAIN_DATA = "Return plain data (numbers, arrays, state_dict()) instead"


class Remedy(NamedTuple):
    """Why something stays where it is, and what to do instead."""

    reason: str
    instead: str = "Create it inside main, or leave it out of what main refers to"
    returned: str = _PLAIN_DATA
    scored: str = "Load or make it where the model predicts, or leave it out"


_TO_RANKS = "rows = horovodrunner.data.from_dataframe"

_KINDS = {
    re.compile(pattern): text
    for pattern, text in {
        r"pyspark\.sql\.(\w+\.)*dataframe\.DataFrame$": Remedy(
            "a Spark DataFrame is on the driver only",
            f"Let main use {_TO_RANKS}(df), made before run(); or, if it is small, df.toPandas()",
        ),
        r"pyspark\.pandas\.": Remedy(
            "pandas-on-Spark is on the driver only",
            f"Let main use {_TO_RANKS}(psdf.to_spark()), made before run(); or, if it is small, "
            "psdf.to_pandas()",
        ),
        r"pyspark\.(core\.)?rdd\.RDD$": Remedy(
            "an RDD is on the driver only",
            f"Let main use {_TO_RANKS}(rdd.toDF()), made before run(); or, if it is small, "
            "rdd.collect()",
        ),
        r"pyspark\.(core\.)?broadcast\.Broadcast$": Remedy(
            "a broadcast variable reaches Spark's own tasks only",
            "Use its value, x = broadcast.value: what main uses is sent to each executor once",
        ),
        r"pyspark\.sql\.(\w+\.)*udf\.UserDefinedFunction$": Remedy(
            "a UDF is for Spark's queries only",
            "Let main use the plain function instead: function = the_udf.func, before run()",
        ),
        r"pyspark\.(sql\.(\w+\.)*session\.SparkSession|(core\.)?context\.SparkContext)$": Remedy(
            "Spark is on the driver only",
            f"Read DataFrames before run(), and let main use {_TO_RANKS}(df)",
        ),
        r"(pyspark|py4j)\.(?!sql\.types\.|ml\.linalg\.)": Remedy(
            "Spark's objects are on the driver only",
            f"Let main use plain values, or {_TO_RANKS}(df), made before run()",
        ),
        r"(\w+\.)*(Remote)?DBUtils$": Remedy(
            "dbutils is on the driver only",
            "Ask it before run(), and let main use the answers",
        ),
        r"IPython\.core\.interactiveshell\.InteractiveShell$": Remedy(
            "the notebook's magics and ! commands are on the driver only",
            "Use subprocess.run(...) or a Python function in main",
        ),
        r"absl\.flags\.": Remedy(
            "absl's flags are on the driver only",
            "Let main use their values: flags = FLAGS.flag_values_dict(), before run()",
        ),
        r"builtins\.coroutine$": Remedy(
            "a coroutine runs only where it is awaited",
            "Let main make it, and run it with asyncio.run(...)",
            "Return what it gives, asyncio.run(...)",
        ),
        r"_?asyncio\.": Remedy("it belongs to the event loop of its process"),
        r"contextlib\._(Async)?GeneratorContextManager$": Remedy(
            "a context manager stays where it was made",
            "Let main make it",
            "Let main enter it, `with ...:`, and return a value",
        ),
        r"builtins\.(async_)?generator$": Remedy(
            "a generator runs only where it was made",
            "Let main make it, or use list(...) of it",
            "Return list(...) of it",
        ),
        r"_io\.(Text|Buffered|File)|tempfile\.|zipfile\.|tarfile\.|h5py\.": Remedy(
            "an open file stays in its process", "Let main have the path, and open it there"
        ),
        r"tensorflow\.(\w+\.)*(func_graph\.FuncGraph|ConcreteFunction)$": Remedy(
            "a function that TensorFlow has traced stays in the process that traced it",
            "Apply tf.function inside main, to the plain function",
        ),
        r"torch\.jit\.|(\w+\.)*(\w*Script(Module|Function)|TopLevelTracedModule)$": Remedy(
            "TorchScript does not pickle",
            "Send the module that it was made of; or save it with torch.jit.save(...) and let main "
            "load it with torch.jit.load(...)",
            "Return the module that it was made of, or its state_dict()",
            "Give the module that it was made of; or, instead of a Model, a function that calls "
            "torch.jit.load(...) and returns what predicts",
        ),
        r"torch\.nn\.utils\.parametrize\.Parametrized": Remedy(
            "a module with parametrizations (weight_norm, orthogonal, ...) does not pickle",
            "Send its state_dict() and let main make the module anew; or take them out first: "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')",
            "Return its state_dict()",
            "Take them out first: torch.nn.utils.parametrize.remove_parametrizations(layer, "
            "'weight')",
        ),
        r"torch\.utils\.data\.dataloader\._\w*Iter$": Remedy(
            "an iterator of a DataLoader stays in its process",
            "Let main have the DataLoader, or the dataset, and call iter(...) there",
        ),
        r"(torch\._dynamo\.|torch\.utils\._config_module\.)": Remedy(
            "what torch.compile or torch.export has made stays in its process",
            "Send the plain function or module, and call torch.compile(...) inside main",
        ),
        r"(tensorflow|tf_keras)\.(\w+\.)*(distribute\.\w+\.\w*Strategy\w*|"
        r"distribute_lib\.\w*Strategy\w*)$": Remedy(
            "a strategy of tf.distribute stays in its process, and so do optimizers of tf_keras",
            "Create it inside main",
        ),
        r"tensorflow\.(\w+\.)*summary_ops_v2\.": Remedy(
            "a writer of summaries stays in its process",
            "Let main make it: tf.summary.create_file_writer(...)",
        ),
        r"tensorflow\.(\w+\.)*(data\.ops\.|client\.session\.|framework\.ops\.Graph$)": Remedy(
            "TensorFlow's datasets, sessions and graphs stay in the process that made them"
        ),
        r"concurrent\.futures\.|multiprocessing\.pool\.|threading\.Thread$": Remedy(
            "threads and processes stay with the process that started them"
        ),
    }.items()
}
"""By the name of a class."""


def remedy_for(thing: Any) -> Remedy | None:
    """Return why something stays in its process, and what to do, where that is known."""
    kind = type(thing)
    if issubclass(kind, types.FunctionType) and {"func", "evalType"} <= vars(thing).keys():
        return _of("pyspark.sql.udf.UserDefinedFunction")  # its UDF in a wrapper of Spark's
    if issubclass(kind, types.FunctionType) and "_torchdynamo_orig_callable" in vars(thing):
        return _of("torch._dynamo.")
    if issubclass(kind, type):
        return None
    for name in class_names(kind):
        if (found := _of(name)) is not None:
            return found
    return None


def _of(name: str) -> Remedy | None:
    return next((text for pattern, text in _KINDS.items() if pattern.match(name)), None)
