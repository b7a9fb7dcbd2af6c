"""A federation in one process: its clients are called one after another, for simulations that need no Ray.

What is sent goes through Flower's own messages, so that a client app that works here works on a SuperNode.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["LocalGrid"]

SERVER = 0  # its number as a node
FAILED = 1  # any number: Flower's own codes are not for apps


class LocalGrid(Grid):  # type: ignore[misc] # Flower is as if absent to the type checker
    """Nodes that all run one client app in this process.

    Attributes:
        contexts: of each node, by its number; ``partition-id`` in its ``node_config`` tells nodes apart.
    """

    def __init__(self, app: ClientApp, nodes: int, config: Mapping[str, Any] | None = None) -> None:
        """Make the nodes, whose numbers begin with 1.

        Args:
            app: what each node runs.
            nodes: how many there are.
            config: the run's configuration, which all see.
        """
        # Flower asks the process who it is when a message is made; on a SuperLink that is set beforehand.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SERVER
        self._app = app
        self.contexts = {
            number: Context(
                run_id=1,
                node_id=number,
                node_config={"partition-id": number - 1, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(config or {}),
            )
            for number in range(1, nodes + 1)
        }
        self._answers: dict[str, Message] = {}
        self._numbers = itertools.count()

    def set_run(self, run: Any) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Any:
        """No run of a SuperLink."""
        raise NotImplementedError("a local grid belongs to no run of a SuperLink.")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message; Flower's own constructor does the same."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the numbers of all nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have nodes answer, at once; return the numbers under which ``pull_messages`` has the answers."""
        numbers = []
        for message in messages:
            numbers.append(str(next(self._numbers)))
            self._answers[numbers[-1]] = self._answer(message)
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return answers, each once."""
        return [self._answers.pop(number) for number in message_ids if number in self._answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Return the answers of all nodes that messages are for."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        """Return what a node answers; an exception in it becomes an error, as on a SuperNode."""
        try:
            return self._app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(Error(FAILED, f"{type(error).__name__}: {error}"), reply_to=message)
