"""A report: its content, and the forms in which people read it: console, report.md, charts, report.html."""
