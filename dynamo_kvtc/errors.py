"""Every error this package raises on purpose.

KvtcError
|-- ConfigError               an argument or configuration value that cannot be used
|-- MissingDependencyError    an optional package or device that was asked for is not here
|-- UnsupportedModelError     the model's attention or cache is of a kind the codec cannot code
|-- CalibrationError          calibration cannot give a usable artifact
|   |-- TooFewTokensError     fewer calibration tokens than the asked rank can bear
|   `-- UnreachableTargetError  no step size gives the asked ratio or KL
|-- ArtifactError             a calibration artifact
|   |-- ArtifactFormatError   its bytes are damaged, truncated or forged
|   |-- ArtifactVersionError  its format version is unknown to this release
|   `-- ArtifactMismatchError it belongs to another model, revision, dtype or TP rank
|-- EngineError               the engine, or KVBM's leader, on the other side of an adapter
|   |-- EngineVersionError    a release whose private protocol this release does not know
|   |-- EngineProtocolError   a message that no known release sends
|   `-- EngineTimeoutError    it did not answer, or a transfer did not end, in time
|-- NatsError                 the NATS server, or a peer behind it
|   |-- NatsUnavailableError  no server answers, it refused the connection, or the connection was lost
|   |-- NatsTimeoutError      no answer before the deadline
|   `-- NatsRefusedError      the server, or a peer, answered that it will not
|-- EventError                a message about blocks or workers
|   |-- EventFormatError      its bytes are damaged, oversized or forged
|   `-- EventVersionError     its version is unknown to this release
|-- TransferError             records on their way between workers
|   |-- TransferProtocolError bytes that no peer of this release sends
|   |-- TransferRefusedError  the holder does not serve this asker, or not now
|   |-- TransferTimeoutError  the other side did not answer, send or take in time
|   `-- PeerGoneError         the connection could not be made, or ended
`-- RecordError               a coded block
    |-- RecordTruncatedError  fewer (or more) bytes than it says it has
    |-- RecordCorruptError    a checksum or the entropy decoder's end state disagrees
    |-- RecordFormatError     a field has a value no encoder writes
    |-- RecordVersionError    its format version is unknown to this release
    `-- RecordMismatchError   it was coded with another artifact or operating point

A message names the value that was wrong, the value expected and, where there is one, the remedy.
Foreign exceptions are translated where they enter, with ``raise ... from exc``.
"""


class KvtcError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(KvtcError, ValueError):
    """An argument or configuration value cannot be used."""


class MissingDependencyError(KvtcError, ImportError):
    """An optional package or device that was asked for is not available."""


class UnsupportedModelError(KvtcError):
    """The model's attention or cache is of a kind the codec cannot code."""


class CalibrationError(KvtcError):
    """Calibration cannot give a usable artifact."""


class TooFewTokensError(CalibrationError):
    """Fewer calibration tokens than the asked rank can bear."""


class UnreachableTargetError(CalibrationError):
    """No step size gives the asked ratio or KL; the message names the reachable range."""


class ArtifactError(KvtcError):
    """A calibration artifact cannot be used."""


class ArtifactFormatError(ArtifactError):
    """The artifact's bytes are damaged, truncated or forged."""


class ArtifactVersionError(ArtifactError):
    """The artifact's format version is unknown to this release."""


class ArtifactMismatchError(ArtifactError):
    """The artifact belongs to another model, revision, dtype or TP rank."""


class EngineError(KvtcError):
    """The engine, or KVBM's leader, on the other side of an adapter cannot be worked with."""


class EngineVersionError(EngineError):
    """The installed release's private protocol is unknown to this release."""


class EngineProtocolError(EngineError):
    """A message that no known release of the engine or KVBM sends."""


class EngineTimeoutError(EngineError):
    """The other side did not answer, or a transfer did not end, in time."""


class NatsError(KvtcError):
    """The NATS server, or a peer behind it, cannot be worked with."""


class NatsUnavailableError(NatsError):
    """No server answers, it refused the connection, or the connection was lost."""


class NatsTimeoutError(NatsError):
    """No answer before the deadline."""


class NatsRefusedError(NatsError):
    """The server, or a peer, answered that it will not."""


class EventError(KvtcError):
    """A message about blocks or workers cannot be used."""


class EventFormatError(EventError):
    """The message's bytes are damaged, oversized or forged."""


class EventVersionError(EventError):
    """The message's version is unknown to this release."""


class TransferError(KvtcError):
    """Records could not be moved between workers; what did not arrive is computed again."""


class TransferProtocolError(TransferError):
    """Bytes arrived that no peer of this release sends."""


class TransferRefusedError(TransferError):
    """The holder does not serve this asker, or not now."""


class TransferTimeoutError(TransferError):
    """The other side did not answer, send or take in time."""


class PeerGoneError(TransferError):
    """The connection could not be made, or ended."""


class RecordError(KvtcError):
    """A coded block cannot be decoded; the engine must recompute it."""


class RecordTruncatedError(RecordError):
    """The record has fewer (or more) bytes than it says."""


class RecordCorruptError(RecordError):
    """A checksum or the entropy decoder's end state disagrees."""


class RecordFormatError(RecordError):
    """A field of the record has a value no encoder writes."""


class RecordVersionError(RecordError):
    """The record's format version is unknown to this release."""


class RecordMismatchError(RecordError):
    """The record was coded with another artifact or operating point."""
