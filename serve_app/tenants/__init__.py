"""Tenants: who shares this fleet, what each may use, and what each used.

tenant.py and registry.py say who a key belongs to. docs/tenants.md is the page for users.
"""
