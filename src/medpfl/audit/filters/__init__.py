"""Audit of a privacy filter: any callable that turns an update into what is sent in its place."""

from medpfl.audit.filters.claims import Claim
from medpfl.audit.filters.findings import Finding
from medpfl.audit.filters.page import FilterAudit, as_plain, audit_filter
from medpfl.audit.filters.subject import Subject, load_filter

__all__ = ["Claim", "FilterAudit", "Finding", "Subject", "as_plain", "audit_filter", "load_filter"]
