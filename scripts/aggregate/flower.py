"""One round of Flower's SecAgg+ in one process: its own workflow and mod, its defaults, the complete graph.

Left out of the measurement, in Flower's favour: making and packing the updates, handing down a global model, moving bytes
between server and clients (messages are passed as objects), and averaging the results by a strategy.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterable

import cryptography
import flwr
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Parameters, Status, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.server import LegacyContext, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.supercore.task_identity import TaskIdentity
from vectors import CLIP, Case, read_case

CLIPPING, RANGE, MAX_WEIGHT = 8.0, 1 << 22, 1000.0  # The defaults of SecAggPlusWorkflow.


class InProcess:
    """Calls every client's mod where a grid would send a message; counts what the clients would send up."""

    def __init__(self, replies: dict[int, RecordDict]) -> None:
        self._replies = replies
        self._contexts = {
            node: Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={}) for node in replies
        }
        self.up = 0

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None) -> list[Message]:
        """The replies of all clients, one after another."""
        assert timeout is None
        return [self._deliver(message) for message in messages]

    def _deliver(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        # A client takes values out of what it receives; over a network each has its own copy.
        records = {
            name: ConfigRecord(dict(record)) if isinstance(record, ConfigRecord) else record
            for name, record in message.content.items()
        }
        message.content = RecordDict(records)
        reply = secaggplus_mod(message, self._contexts[node], lambda m, _: Message(self._replies[node], reply_to=m))
        self.up += sum(_size(value) for record in reply.content.config_records.values() for value in record.values())
        return reply


class TakeTheMean(FedAvg):
    """The workflow puts the mean into every result; FedAvg would average those equal vectors once more."""

    def aggregate_fit(self, _number: int, results: list, _failures: list) -> tuple[Parameters, dict]:
        """The mean, as it is."""
        return results[0][1].parameters, {}


def _size(value: object) -> int:
    if isinstance(value, list):
        return sum(_size(item) for item in value)
    return len(value) if isinstance(value, bytes | str) else 8


def _reply(vector: np.ndarray, weight: int) -> RecordDict:
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([vector]), weight, {})
    return fitres_to_recorddict(result, keep_input=True)


def _context(case: Case, grid: InProcess, nodes: Iterable[int]) -> LegacyContext:
    manager = SimpleClientManager()
    for node in nodes:
        manager.register(GridClientProxy(node, grid, run_id=1))
    n = case.clients
    context = LegacyContext(
        Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}),
        strategy=TakeTheMean(min_fit_clients=n, min_evaluate_clients=n, min_available_clients=n),
        client_manager=manager,
    )
    context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: 1})
    context.state.array_records[MAIN_PARAMS_RECORD] = ArrayRecord()
    return context


def _tolerance(case: Case) -> float:
    """What stochastic rounding to its grid, of the values and of the weights, may cost the mean."""
    step, ratio = 2 * CLIPPING / RANGE, sum(case.weights()) / MAX_WEIGHT
    return (case.clients * step + CLIP * case.clients / RANGE) / ratio


def main() -> None:
    """Run one round and print its figures."""
    case = read_case()
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    data = zip(case.vectors(), case.weights(), strict=True)
    replies = {1000 + i: _reply(vector, weight) for i, (vector, weight) in enumerate(data)}
    grid = InProcess(replies)
    context = _context(case, grid, replies)
    workflow = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=case.threshold)
    wall, begin = time.perf_counter(), time.process_time()
    workflow(grid, context)
    cpu, wall = time.process_time() - begin, time.perf_counter() - wall
    record = context.state.array_records[MAIN_PARAMS_RECORD]
    packed = Parameters([array.data for array in record.values()], "numpy.ndarray")
    error = case.error_of(parameters_to_ndarrays(packed)[0])
    print(
        json.dumps(
            {
                "cpu_seconds": cpu,
                "wall_seconds": wall,
                "bytes_per_param_up": grid.up / case.clients / case.dim,
                "max_abs_error": error,
                "correct": error <= _tolerance(case),
                "versions": {
                    "flwr": flwr.__version__,
                    "python": platform.python_version(),
                    "numpy": np.__version__,
                    "cryptography": cryptography.__version__,
                },
            }
        )
    )


if __name__ == "__main__":
    main()
