"""One HTML page on one run or several: python -m training.results.report RUN [RUN ...]"""

from training.results.report.page import REPORT_FILE, write_report

__all__ = ["REPORT_FILE", "write_report"]
