"""Which course a job's mode of training takes."""

from __future__ import annotations

from securesplit.protocol.job import Job
from securesplit.server.attendance import Attendance
from securesplit.server.course import Course
from securesplit.server.lanes import Lanes
from securesplit.server.together import Together

__all__ = ["course_of"]


def course_of(job: Job) -> Course:
    """A fresh course."""
    mode = job.mode
    attendance = Attendance(job.sums.roster, mode.straggler_seconds)
    if mode.mode == "client-batch":
        return Together(attendance, patience=mode.straggler_seconds)
    return Lanes(
        mode.lanes(job.sums.roster), attendance, order=mode.order, every=mode.every, replicated=mode.replicated
    )
