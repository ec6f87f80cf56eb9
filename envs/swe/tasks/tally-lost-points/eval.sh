#!/bin/bash
set -uxo pipefail
cd /testbed
rm -f tests/test_intervals.py
git checkout HEAD -- tests/test_intervals.py
git apply --whitespace=nowarn - <<'END_OF_TESTS'
diff --git a/tests/test_intervals.py b/tests/test_intervals.py
index 39c14af..1d3c3f0 100644
--- a/tests/test_intervals.py
+++ b/tests/test_intervals.py
@@ -9,6 +9,10 @@ def test_merge_touching():
     assert merge([(1, 2), (2, 3)]) == [(1, 3)]
 
 
+def test_merge_contained():
+    assert merge([(1, 10), (2, 3), (4, 5)]) == [(1, 10)]
+
+
 def test_merge_unordered_and_empty():
     assert merge([(5, 6), (1, 2), (3, 3)]) == [(1, 2), (5, 6)]
     assert merge([]) == []
@@ -16,7 +20,13 @@ def test_merge_unordered_and_empty():
 
 def test_total():
     assert total([(0, 5), (3, 8), (10, 11)]) == 9
+    assert total([(0, 10), (1, 2)]) == 10
 
 
 def test_gaps():
     assert gaps([(2, 3), (5, 6)], 0, 8) == [(0, 2), (3, 5), (6, 8)]
+
+
+def test_gaps_beyond_the_end():
+    assert gaps([(2, 3), (9, 12)], 0, 8) == [(0, 2), (3, 8)]
+    assert gaps([(0, 8)], 0, 8) == []
END_OF_TESTS
: '>>>>> Start Test Output'
PYTHONPATH=/testbed/src:/testbed:$PYTHONPATH python3 -m pytest -rA --tb=short -p no:cacheprovider tests
: '>>>>> End Test Output'
