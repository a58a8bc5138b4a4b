"""Errors a user can meet. Each message is one paragraph: what was given, what is wrong with it, what to do."""


class SppoError(Exception):
    """Base of every error this project raises on purpose."""


class ConfigError(SppoError):
    """Refused input (config, data, model folder, run directory). The command line exits with code 2."""


class JudgeError(SppoError):
    """The judge produced something unusable, e.g. NaN logits."""


class LearnerError(SppoError):
    """Training cannot go on, e.g. a non-finite loss; the message carries the prompt ids of the batch."""


class WeightSyncError(SppoError):
    """A rollout worker does not serve the weights that were trained (time-out or checksum mismatch)."""


class WorkerFailed(SppoError):
    """An actor died or raised; the message begins with the actor's name and its own error."""


class WorkerDied(WorkerFailed):
    """An actor's process ended, or cannot go on as it is. What it was asked for may well work when all actors of the run are
    started again."""


class GroupAborted(SppoError):
    """A publish ended a group half-way (`weights.pause=abort`); it is to be sampled again."""


class GroupLost(SppoError):
    """A group's data died with the node that held it; it is to be sampled again: the same seeds give the same group."""
