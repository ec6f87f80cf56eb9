#!/bin/bash
set -uxo pipefail
cd /testbed
rm -f tests/test_tables.py
git checkout HEAD -- tests/test_tables.py
git apply --whitespace=nowarn - <<'END_OF_TESTS'
diff --git a/tests/test_tables.py b/tests/test_tables.py
index edcc4b0..51d5016 100644
--- a/tests/test_tables.py
+++ b/tests/test_tables.py
@@ -7,6 +7,19 @@ def test_columns():
 
 def test_nothing():
     assert render([]) == ""
+    assert render([], totals=True) == ""
+
+
+def test_totals():
+    assert render([("a", 1), ("b", 2)], totals=True).splitlines()[-1] == "total  3"
+
+
+def test_spans():
+    assert render([("a", 5400)], unit="span") == "a  1h 30m"
+
+
+def test_totals_of_spans():
+    assert render([("a", 5400), ("b", 1800)], totals=True, unit="span").splitlines()[-1] == "total      2h"
 
 
 def test_rows_may_be_a_generator():
END_OF_TESTS
: '>>>>> Start Test Output'
PYTHONPATH=/testbed/src:/testbed:$PYTHONPATH python3 -m pytest -rA --tb=short -p no:cacheprovider tests
: '>>>>> End Test Output'
