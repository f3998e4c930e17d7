"""Faulty servers that deliver to webhooks wrongly."""

from __future__ import annotations

from proofs.conformance.fault import Edit, Fault

ATTEMPTS, READER = "webhooks/attempts.py", "webhooks/log_reader.py"

WEBHOOK_FAULTS = (
    Fault(
        "the body of a delivery is not signed",
        (55,),
        (Edit(ATTEMPTS, "now // SECOND, body)", 'now // SECOND, b"")'),),
        case="Events of a session are delivered",
    ),
    Fault(
        "questions are not delivered",
        (55,),
        (
            Edit(
                READER,
                "if not self._wants_inputs:\n            return []",
                "if True:\n            return []",
            ),
        ),
        case="Events of a session are delivered",
    ),
    Fault(
        "a webhook of one run delivers the events of all runs",
        (55,),
        (
            Edit("store/webhooks.py", "body.run_id != self.of_run.run_id", "False"),
            Edit(READER, "if run_id else EventFilter(ids)", "if False else EventFilter(ids)"),
        ),
        case="A webhook of one run delivers",
    ),
)
