"""Dagster's Postgres storage, told which driver to use: it needs psycopg2, and SQLAlchemy 2.1 would take psycopg 3."""

from typing import Any

from dagster._serdes import ConfigurableClassData
from dagster_postgres import DagsterPostgresStorage

from rankd_pipeline.settings import with_driver


class PostgresStorage(DagsterPostgresStorage):
    """`storage: custom` of a home on PostgreSQL; postgres_url as RANKD_DAGSTER_POSTGRES_URL has it."""

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Any) -> "PostgresStorage":
        return cls(postgres_url=with_driver(config_value["postgres_url"]), inst_data=inst_data)
