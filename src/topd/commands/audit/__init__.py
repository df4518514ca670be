"""``topd audit`` and ``topd replay``: is a run folder what was run, and does the run repeat?

An audit checks the chain of the ledger, the files and records against it, and models and data
against their fingerprints. Then it takes updates at random and makes their decisions again from the
stored rollouts: the teacher scores them, writes its windows, and the method decides. The student of
a later update is gone, so what needs its weights is not re-derived there (its log-probs at
sampling, detectors and methods with statistics, ``embedding: student``, what
``relay`` lets it write); a replay does that, from the checkpoint before.
"""

from topd.commands.audit.check import audit_run
from topd.commands.audit.rebuilt import Trust, stored_recipe
from topd.commands.audit.replay import replay_step
from topd.commands.audit.result import AuditResult

__all__ = ["AuditResult", "Trust", "audit_run", "replay_step", "stored_recipe"]
