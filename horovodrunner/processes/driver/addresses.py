"""Where the driver listens, and where the tasks may. Runs in: the driver."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING, Any

from horovodrunner.errors import ConfigurationError
from horovodrunner.processes.task.network import find_address, without_brackets
from horovodrunner.spark.session import is_connect

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

__all__ = ["advertised_host", "bind_host", "channel_port", "task_ports"]

HOST_CONF = "spark.horovodrunner.driver.host"
PORT_CONF = "spark.horovodrunner.driver.port"
PORTS_CONF = "spark.horovodrunner.ports"
MAX_PORT = 65535


def bind_host(spark: SparkSession) -> str:
    """Return at which of its addresses this process listens for the run.

    ``spark.driver.bindAddress`` where this process is Spark's driver, else all addresses.
    """
    everywhere = "::" if ":" in advertised_host(spark) else "0.0.0.0"  # noqa: S104
    if is_connect(spark):
        return everywhere  # that setting is the server's
    return without_brackets(spark.conf.get("spark.driver.bindAddress", None) or everywhere)


def advertised_host(spark: SparkSession) -> str:
    """Return the name or address at which the tasks find this process."""
    chosen = spark.conf.get(HOST_CONF, None)
    if not is_connect(spark):
        chosen = chosen or spark.conf.get("spark.driver.host", None)
        return without_brackets(chosen or find_address(socket.gethostname(), None)[0])
    client: Any = spark.client
    return without_brackets(chosen or find_address("", None, [client.host])[0])


def channel_port(spark: SparkSession) -> int:
    """Return the port on which the driver listens; 0, the default, for any free one."""
    value = spark.conf.get(PORT_CONF, None) or "0"
    if not value.isdecimal() or int(value) > MAX_PORT:
        raise ConfigurationError(
            f"{PORT_CONF}={value!r}: it must be a port number up to {MAX_PORT}, or 0 for any free "
            "one"
        )
    return int(value)


def task_ports(spark: SparkSession) -> tuple[int, int] | None:
    """Return the first and the last port on which tasks and their workers may listen, or None."""
    value = spark.conf.get(PORTS_CONF, None)
    if not value:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*-\s*(\d+)\s*", value)
    if not match or not 0 < int(match[1]) < int(match[2]) <= MAX_PORT:
        raise ConfigurationError(
            f"{PORTS_CONF}={value!r}: it must be a range of ports such as 40000-40099"
        )
    return int(match[1]), int(match[2])
