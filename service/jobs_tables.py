"""The tables of service.jobs."""

import sqlalchemy as sa

metadata = sa.MetaData()

evaluations = sa.Table(
    "evaluations",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("id", sa.String(32), nullable=False, unique=True),
    sa.Column("idempotency_key", sa.Text, unique=True),
    sa.Column("digest", sa.String(64), nullable=False),
    sa.Column("protocol", sa.Text, nullable=False),
    sa.Column("dataset", sa.Text, nullable=False),
    sa.Column("settings", sa.Text, nullable=False),  # JSON
    sa.Column("seed", sa.BigInteger, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("queue", sa.Text, nullable=False),
    sa.Column("status", sa.Text, nullable=False, index=True),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("fence", sa.Integer, nullable=False),  # of the last lease
    sa.Column("cancel", sa.Integer, nullable=False),  # 1: was asked for
    sa.Column("lease_until", sa.Double),
    sa.Column("worker", sa.Text),
    sa.Column("rung_at", sa.Double, nullable=False),
    sa.Column("queued_since", sa.Double, nullable=False),
    sa.Column("progress", sa.Text),  # JSON
    sa.Column("error", sa.Text),  # JSON
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("started_at", sa.Double),
    sa.Column("finished_at", sa.Double),
    sqlite_autoincrement=True,
)

# Beside the jobs, so that a list of them does not read the reports.
reports = sa.Table(
    "evaluation_reports",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("document", sa.Text, nullable=False),  # report.json
    sa.Column("page", sa.LargeBinary, nullable=False),  # report.html
)

workers = sa.Table(
    "evaluation_workers",
    metadata,
    sa.Column("name", sa.String(255), primary_key=True),
    sa.Column("queues", sa.Text, nullable=False),  # with commas
    sa.Column("seen_at", sa.Double, nullable=False),
)
