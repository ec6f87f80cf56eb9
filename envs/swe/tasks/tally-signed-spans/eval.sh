#!/bin/bash
set -uxo pipefail
cd /testbed
rm -f tests/test_spans.py
git checkout HEAD -- tests/test_spans.py
git apply --whitespace=nowarn - <<'END_OF_TESTS'
diff --git a/tests/test_spans.py b/tests/test_spans.py
index 9940653..3b9198e 100644
--- a/tests/test_spans.py
+++ b/tests/test_spans.py
@@ -16,10 +16,16 @@ def test_what_is_no_span(text):
         parse_span(text)
 
 
-@pytest.mark.parametrize("seconds", [0, 1, 59, 60, 3661, 86400, 90061])
+def test_negative():
+    assert parse_span("-1h 30m") == -5400
+    assert parse_span("+5s") == 5
+
+
+@pytest.mark.parametrize("seconds", [0, 1, 59, 60, 3661, 86400, 90061, -5400])
 def test_round_trip(seconds):
     assert parse_span(format_span(seconds)) == seconds
 
 
 def test_format():
     assert format_span(5400) == "1h 30m"
+    assert format_span(-172800) == "-2d"
END_OF_TESTS
: '>>>>> Start Test Output'
PYTHONPATH=/testbed/src:/testbed:$PYTHONPATH python3 -m pytest -rA --tb=short -p no:cacheprovider tests
: '>>>>> End Test Output'
