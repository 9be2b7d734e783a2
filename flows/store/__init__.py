"""Store maintenance: list, trace, verify and compare artifacts, import and export weights."""
