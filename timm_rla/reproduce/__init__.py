"""The paper's tables: which runs they need, running them, and the report from their results."""
