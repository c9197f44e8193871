"""Every wait of the pipeline: who waits for what, how long, and what happens when the time is over.

A wait that an operator may change is a setting; `SETTING_WAITS` says of each what it means. All others are constants
here, and a test holds that no other module of stages and cluster has one. `fictl config budgets` prints both. Where one
wait must end before another, `ORDERS` says so, and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

import msgspec

Kind = Literal["limit", "pause"]
"""What is not done by then is given up or told; or: so long until the next look or try."""


class Budget(msgspec.Struct, frozen=True):
    """One wait.

    Attributes:
        s: seconds.
        kind: limit or pause.
        waits: who waits for what.
        then: what happens when the time is over.
    """

    s: float
    kind: Kind
    waits: str
    then: str


def _limit(seconds: float, waits: str, then: str) -> Budget:
    return Budget(seconds, "limit", waits, then)


def _pause(seconds: float, waits: str, then: str) -> Budget:
    return Budget(seconds, "pause", waits, then)


# The connection to the servers.
FIRST_CONNECTION: Final = _limit(10.0, "a process: its first server to answer", "it fails: is the cluster up?")
CONNECT_ATTEMPT: Final = _limit(1.0, "a client: one server to take its connection", "it tries the next server")
RECONNECT_PAUSE: Final = _pause(0.1, "a client: between two attempts to connect", "it tries again, for ever")
PING_INTERVAL: Final = _pause(
    1.0,
    "a client: between two pings of its server",
    "pings again; the third in vain, while nothing moves, counts as a lost connection",
)
CONNECTION_END: Final = _limit(
    1.0, "a client that ends: its server to take what was sent, and to say farewell", "it cuts the connection"
)
TROUBLE_COUNTS: Final = _limit(
    10.0, "a client: how long trouble with its connection counts", "it is over, or told in the log again"
)
SERVER_USELESS: Final = _limit(
    10.0,
    "a client: any stream to answer through its server, elections included; twice as long for each one left in vain",
    "it goes on at another server: this one may be cut off from the others",
)
GREETING: Final = _limit(
    2.0, "a stage or publisher that connects: a server to say its name, a stream its leader", "it takes any server"
)
FIRST_FACTS: Final = _limit(
    20.0, "a starting process: FI_EVENTS to say how it is partitioned", "it fails and is started again"
)
FACTS_REQUEST: Final = _limit(1.5, "a starting process: one answer of FI_EVENTS", "it asks again")
FACTS_PAUSE: Final = _pause(0.1, "a starting process: before it asks FI_EVENTS again", "it asks")

# Lanes, readers and circuits.
CIRCUIT_PAUSE_MIN: Final = _pause(0.1, "who uses a stream whose circuit opened: the first try, jitter off", "one tries")
CIRCUIT_PAUSE_MAX: Final = _pause(
    0.5, "the same, after doubling; also between two signs of life that count", "one tries for all"
)
CONSUMER_INACTIVE: Final = _limit(20.0, "a server: its consumer to be asked for messages", "it removes the consumer")
CONSUMER_MADE: Final = _limit(
    5.0, "a reader: the server that was given its consumer to make it", "it asks for another one, elsewhere"
)
SWITCH_INTERVAL: Final = _limit(
    0.001, "the event loop of a stage: a thread that computes to let go of the interpreter lock", "it is made to"
)
LET_GO: Final = _limit(
    1.0, "a lane that another process waits for: its frame in hand", "it is cut off, and the other makes that again"
)
CANCEL_REPEAT: Final = _pause(0.5, "whoever ends a task: the task to take its cancellation", "cancels it again")
LEADER_LOOK: Final = _pause(3.0, "a process: between two looks at the streams in memory that it uses", "it looks")
LEADER_GONE: Final = _limit(
    12.0, "the same: a stream in memory to have a leader again, as an election gives it one", "the stream is made again"
)
STREAM_REMADE: Final = _limit(
    12.0, "who asks a stream in memory that is not there: its being made again", "it fails: run `fictl cluster apply`"
)
STANDBY: Final = _pause(
    1.0, "persist: a partition's shards to become its own, or a damaged file to change", "it looks again"
)
SHOW: Final = _pause(0.02, "persist: a commit to be shown to readers along with the next one", "it is shown by itself")
DISK_PAUSE_MIN: Final = _pause(1.0, "a stopped partition: the first try of its disk, jitter off", "it tries")
DISK_PAUSE_MAX: Final = _pause(10.0, "the same, after doubling", "it tries")
MEMBER_LOOK: Final = _pause(
    0.02, "membership: the bucket to show what was heard or said", "it looks again, ten times; then at its renewal"
)
WITNESS_LAG: Final = _limit(
    4.0,
    "ingest, behind the end of the stream: that it is given from memory what came in this time, or twice that (servers "
    "keep 10 s)",
    "it is read again, from two servers",
)
WITNESS_LAG_MAX: Final = _limit(
    60.0, "the same, twice as long each time that no other server has what waits, until nothing waits", "the same"
)
WITNESS_SILENT: Final = _limit(
    3.0,
    "ingest, with messages that were stored before: a second server to give the same ones",
    "the log and /readyz say that they wait; one that has nothing more has a third one asked in its place",
)
LETTER_ORIGINAL: Final = _limit(
    15.0,
    "who buries a letter: the event's own bytes; a leader that lost its majority answers without them for 10 s",
    "the letter is buried with what the frame holds",
)
CONTROL_LOOK: Final = _pause(
    0.02, "a process: the bucket to show a control key that was heard", "it looks again, ten times; then at its renewal"
)
POLICY_FRESH: Final = _limit(
    3.0, "a segment lane that opens: the bucket to say which policy is in force", "it goes on by the one it knows"
)
MEMBERS_UNSEEN: Final = _limit(
    10.0, "membership: the bucket to show the processes, as an election lets it again", "it says why at /readyz"
)
MEMBER_EXPIRED: Final = _pause(0.1, "membership: between two looks for a key that must have expired", "it looks")

# Health, telemetry.
HEALTH_REQUEST: Final = _limit(5.0, "the health port: a whole request, answer included", "the connection is cut")
HEALTH_BEAT: Final = _pause(0.25, "/livez: between two timers of the event loop", "the next; how late it is, is told")
HEALTH_STUCK: Final = _limit(5.0, "/livez: the event loop to run a timer", "the process says that it does not live")
HEALTH_LOOK: Final = _pause(5.0, "gauges: between two looks at streams and disk", "it looks")
PAPERS_LOOK: Final = _pause(300.0, "gauges: between two looks at when certificates and credentials expire", "it looks")
HEALTH_FRESH: Final = _limit(1.0, "/readyz: how long what was seen counts", "it looks again")
HEALTH_ASK: Final = _limit(1.0, "/readyz: a stream or the disk to answer", "the process says that it is not ready")
HEALTH_DISK: Final = _limit(5.0, "/readyz: a commit of persist to be on disk", "the process says that its disk hangs")
HEALTH_ANSWER: Final = _limit(
    4.0, "`fictl health`: a process to answer, which takes little more than HEALTH_ASK", "it counts as frozen"
)
OTLP_REQUEST: Final = _limit(2.0, "an export: the collector to take it", "it is dropped; the next holds its sums")
OTLP_ANSWER: Final = _limit(
    10.0, "an export: the collector's answers, however they drip in", "the log says so; it goes on once they end"
)
OTLP_CLOSE: Final = _limit(4.0, "an ending process: its last export", "it ends without")

# Servers and stage processes of a supervisor.
SERVER_START: Final = _limit(60.0, "a supervisor: a server to be healthy", "the start fails, with the log's end")
SERVER_STOP: Final = _limit(15.0, "a supervisor: a server to end after SIGTERM", "SIGKILL")
SERVER_ANSWER: Final = _limit(2.0, "a supervisor: a starting server to answer", "it asks again until its limit")
LEADER_ANSWER: Final = _limit(
    0.1, "the same: JetStream to answer, the first time; twice as long each time after", "it asks again until its limit"
)
SERVER_POLL: Final = _pause(0.05, "a supervisor: between two such questions", "it asks")
DIRECTORY_LOCK: Final = _limit(
    20.0, "a supervisor: another's hold on the directory to end", "it fails and says how to stop that run"
)
LOCK_POLL: Final = _pause(0.05, "whoever waits for a lock: between two tries", "it tries")
STAGE_READY: Final = _limit(
    90.0, "a supervisor: a stage to recover its partitions and be ready", "it is killed, and the start has failed"
)
RESTART_PAUSE_MIN: Final = _pause(0.1, "a supervisor: before it starts what died, the first time", "it starts it")
RESTART_PAUSE_MAX: Final = _pause(5.0, "the same, after doubling", "it starts it")
RESTART_HEALTHY: Final = _limit(10.0, "a supervisor: a process to stay up", "its pauses begin anew")
KILLED: Final = _limit(30.0, "whoever sent SIGKILL: the kernel to end the process", "it fails: the disk may hang")
STATE_WRITE: Final = _limit(5.0, "a supervisor: its state file to be written", "it goes on, and so does the write")
STATE_PAUSE: Final = _pause(1.0, "a supervisor: before it saves again what its full disk refused", "it saves its state")
CONTROL_REQUEST: Final = _limit(5.0, "a supervisor: a request on its socket to be sent", "it is refused")

# Gateways and streams.
ACCEPT: Final = _limit(
    2.0, "a gateway: acknowledgement by FI_EVENTS of a try that has left", "it sends the same message again"
)
ACCEPT_PAUSE_MIN: Final = _pause(0.05, "a gateway: before the next try, at least", "it sends again")
ACCEPT_PAUSE_MAX: Final = _pause(0.2, "the same, at most; longer after each try in vain", "it sends again")
TOPOLOGY_APPLY: Final = _limit(60.0, "whoever applies the topology: a stream's leader", "it fails; run it again")
TOPOLOGY_PLAN: Final = _limit(10.0, "`fictl cluster plan`, `config check`: the streams", "it fails: not ready")
TOPOLOGY_REQUEST: Final = _limit(3.0, "both: one answer", "they ask again until their limit")
TOPOLOGY_PAUSE_MIN: Final = _pause(0.05, "both: before they ask again, at least", "they ask")
TOPOLOGY_PAUSE_MAX: Final = _pause(0.2, "the same, at most", "they ask")
HOP_DEDUP: Final = _limit(
    120.0, "servers: a stage's repeat of a message id, which comes within seconds", "the fence refuses it"
)
FOLLOWER_HEARD: Final = _limit(
    10.0, "a stream's leader: a follower to say something, as servers judge it", "the replica is shown as behind"
)
STATUS_ANSWER: Final = _limit(2.0, "`fictl cluster status`: one server or stream", "it is shown as not reachable")
STATUS_LOOK: Final = _limit(
    3.0, "`fictl status`, `top`: a whole look at the pipeline", "what it could not read is named"
)
STATUS_FIRST_LOOK: Final = _limit(1.5, "`fictl status`: the first of its two looks", "rates are left out")
STATUS_CONNECT: Final = _limit(1.5, "both: a server to take the connection", "the screen says that none answers")
STATUS_WINDOW: Final = _pause(1.0, "`fictl status`: between its two looks (--window)", "rates are over so long")
TOP_INTERVAL: Final = _pause(1.0, "`fictl top`: from one look to the next (--interval)", "it looks")
TOP_REDRAW: Final = _pause(1.0, "`fictl top`: for something new to show", "the age of what is shown is drawn again")

# Commands.
COMMAND_CONNECT: Final = _limit(5.0, "a command: its first server to answer", "it fails: not ready")
COMMAND_ANSWER: Final = _limit(
    15.0, "a command: one answer of a stream, which may have to elect a leader first", "it fails: not ready"
)
COMMAND_READY: Final = _limit(5.0, "publish and dlq: streams to be there and have leaders", "they fail: not ready")
PROGRESS: Final = _limit(2.0, "whoever looks at a command: its end", "a progress bar is shown")
PROGRESS_REFRESH: Final = _pause(0.1, "a progress bar: between two of its states", "it is drawn again")
UP_START: Final = _limit(180.0, "`fictl up --detach`: all to be ready", "it fails, and what was started is stopped")
UP_STOP: Final = _limit(180.0, "`fictl down`: all to have drained and ended", "it fails; the stop goes on")
UP_POLL: Final = _pause(0.1, "both: between two looks", "they look")
SCALE: Final = _limit(180.0, "`fictl scale` and `drain`: the supervisor to be done", "they fail; it goes on")
RESTART: Final = _limit(
    600.0, "`fictl restart`: the supervisor to have replaced every process", "it fails; the restart goes on"
)
SETTLED: Final = _limit(30.0, "`fictl scale`, `restart`: partitions to have moved (--wait)", "they exit 3")
FLUSH: Final = _limit(120.0, "`fictl flush`: all to be committed and sealed (--timeout)", "it exits 3 and says why")
FLUSH_POLL: Final = _pause(0.1, "the same: between two looks at receipts and seals", "it looks")
FLUSH_EXPLAIN: Final = _limit(2.0, "the same, before its limit: what holds it up", "it says what it knows")
POLICY_SPREAD: Final = _limit(
    30.0, "`fictl policy set`: every process to judge by it (--timeout)", "it exits 3 and names those that do not"
)
POLICY_WRITE: Final = _limit(10.0, "the same: the bucket to take it", "it fails; `fictl policy history` shows whether")
OBEYED: Final = _limit(10.0, "`fictl pause`, `resume`: every process to obey (--wait)", "they exit 3")
DRAINED: Final = _limit(60.0, "`fictl drain`: input to be worked off (--wait)", "it stops the stages and exits 1")
MEMBERS_POLL: Final = _pause(0.1, "the same commands and `policy set`: between two looks", "they look")
MEMBERS_SHOWN: Final = _limit(
    5.0, "`fictl members`: processes to hold all partitions, as they say anew after an election", "it names the others"
)
PAUSE_PUT: Final = _limit(
    15.0,
    "`fictl pause`, `resume`: the bucket to take it, elections included",
    "they fail; `fictl members` shows whether",
)
REBUILD: Final = _limit(120.0, "`fictl rebuild`, `partitions move`: what they wait for (--wait)", "they fail")
REWIND_LOCK: Final = _limit(5.0, "a rebuild: the partition's lock", "it fails: a persister has it")
REWIND_LOCK_POLL: Final = _pause(0.1, "a rebuild: between two tries of that lock", "it tries")
REWIND_POLL: Final = _pause(0.2, "a rebuild: between two looks at the pipeline", "it looks")
LETTERS: Final = _limit(30.0, "`fictl dlq`: one read or one change of letters", "it fails: not ready")
SHARD_CHECK: Final = _limit(120.0, "`fictl verify`: one shard's check (--shard-timeout)", "the shard counts as corrupt")
SHARD_READER: Final = _pause(1.5, "`fictl verify`: one process to have read all shards", "a second one is started")
DEMO_SILENT: Final = _limit(60.0, "`fictl demo`: any event to become durable", "it fails and says how many are missing")


class SettingWait(NamedTuple):
    """What a setting of seconds means. `waits` and `then` as in `Budget`."""

    kind: Kind
    waits: str
    then: str


SETTING_WAITS: Final[dict[str, SettingWait]] = {
    "pull_expires_s": SettingWait("limit", "a server: messages for a reader's standing pull", "the reader pulls again"),
    "heartbeat_s": SettingWait("pause", "a reader: between two heartbeats of its consumer", "the next, or a miss"),
    "frame_gap_s": SettingWait(
        "pause", "ingest: between the frames of a partition, at least", "what came in shares one"
    ),
    "probe_s": SettingWait(
        "pause", "an idle lane: between two checks of its place; longer up to fourfold", "it checks"
    ),
    "publish_timeout_s": SettingWait(
        "limit", "a writer: one try's acknowledgement", "unknown: it sends the same message again"
    ),
    "api_timeout_s": SettingWait("limit", "whoever reads a stream: one answer", "it asks again"),
    "retry_s_min": SettingWait("pause", "both: before the next try, at least", "they try"),
    "retry_s_max": SettingWait("pause", "the same, at most", "they try"),
    "shard_age_s_max": SettingWait("limit", "a live shard's oldest event: to be sealed", "the shard is sealed"),
    "trim_s": SettingWait("pause", "persist: between two purges of what is committed", "it purges"),
    "drain_s": SettingWait("limit", "a stage after SIGTERM: its lanes to finish", "they are cut off; nothing is lost"),
    "breaker_pause_s": SettingWait(
        "pause", "a process that would dead-letter nearly everything: the next try", "each lane tries one message"
    ),
    "member_ttl_s": SettingWait("limit", "the others: a process's announcement", "its partitions are taken over"),
    "member_renew_s": SettingWait("pause", "a process: between two announcements", "it announces itself"),
    "otlp_interval_s": SettingWait("pause", "an export: between two", "it exports"),
    "dedup_window_s": SettingWait(
        "limit", "servers: a gateway's repeat of a message id", "persist finds the repeat by its event id"
    ),
}
"""By the setting's name."""


class Order(NamedTuple):
    """One wait must be over before another.

    Attributes:
        shorter, longer: settings or budgets they are made of; the first named is a setting.
        values: gives both of `contracts.settings.Settings`, in seconds.
        why: what goes wrong otherwise.
        breaks: True: settings that violate it are refused. Else it only costs time, and is told.
    """

    shorter: str
    longer: str
    values: Callable[[Any], tuple[float, float]]
    why: str
    breaks: bool


ORDERS: Final = (
    Order(
        "member_renew_s",
        "member_ttl_s",
        lambda s: (s.member_renew_s, s.member_ttl_s),
        "every process would count as dead between two of its announcements",
        True,
    ),
    Order(
        "2 x heartbeat_s",
        "pull_expires_s",
        lambda s: (2 * s.heartbeat_s, s.pull_expires_s),
        "servers refuse a pull whose heartbeat is longer than half of it, and nothing would be read",
        True,
    ),
    Order(
        "publish_timeout_s",
        "drain_s",
        lambda s: (s.publish_timeout_s, s.drain_s),
        "a stage told to stop is cut off before one try to publish can end",
        False,
    ),
    Order(
        "api_timeout_s",
        "publish_timeout_s",
        lambda s: (s.api_timeout_s, s.publish_timeout_s),
        "a read waits longer for a leader that is gone than a publish does",
        False,
    ),
    Order(
        "heartbeat_s x heartbeats_missed_max",
        "member_ttl_s",
        lambda s: (s.heartbeat_s * s.heartbeats_missed_max, s.member_ttl_s),
        "a process would be taken for dead sooner than its readers notice that their server is",
        False,
    ),
    Order(
        "retry_s_max",
        "publish_timeout_s",
        lambda s: (s.retry_s_max, s.publish_timeout_s),
        "the pause between two tries takes longer than a try",
        False,
    ),
)


class Disorder(NamedTuple):
    """An order that settings violate, and the values."""

    order: Order
    shorter_s: float
    longer_s: float

    def __str__(self) -> str:
        order = self.order
        return f"{order.shorter} = {self.shorter_s:g} must be below {order.longer} = {self.longer_s:g}: {order.why}"


def disorders(settings: Any) -> list[Disorder]:
    """The orders that `settings` violate, those that break something first."""
    found = [Disorder(order, *order.values(settings)) for order in sorted(ORDERS, key=lambda o: not o.breaks)]
    return [disorder for disorder in found if disorder.shorter_s >= disorder.longer_s]


BUDGETS: Final[dict[str, Budget]] = {name: value for name, value in globals().items() if isinstance(value, Budget)}
"""Every constant of this module, by name."""
