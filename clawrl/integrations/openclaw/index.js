// Says with every request of an agent run which session it belongs to, and whether a person asked.
//
//   before_prompt_build ── run, session, trigger ──► runs ──► the run's requests: X-Session-Id, X-Turn-Type
//   session_end ─────────────────────────────────────────────► POST /v1/sessions/{id}/done
//
// Knows OpenClaw's hooks and clawrl's headers. A request of no known run (titles, compaction) goes as it is: clawrl
// knows those by their words.

const KEPT_RUNS = 1000;
const DONE_TIMEOUT_MS = 1500; // OpenClaw's shutdown waits two seconds for all handlers together

/** Headers by run; module-wide, since a plugin may be registered more than once. */
const runs = new Map();

function turnType({ trigger, inputProvenance, sessionKey = "" }) {
  const person = trigger === "user" && (inputProvenance?.kind ?? "external_user") === "external_user";
  const own = /:(subagent|cron)(:|$)/.test(sessionKey); // the session is the agent's, not a person's
  return person && !own ? "main" : "side";
}

function remember(context) {
  if (!context.runId || !context.sessionId) return;
  runs.set(context.runId, { "X-Session-Id": context.sessionId, "X-Turn-Type": turnType(context) });
  if (runs.size > KEPT_RUNS) runs.delete(runs.keys().next().value);
}

/** The headers of the run in a request's id, `<run>:model:<n>`. */
function headersOf(requestId) {
  return typeof requestId === "string" ? runs.get(requestId.replace(/:model:\d+$/, "")) : undefined;
}

async function end(sessionId, { baseUrl, apiKey }, logger) {
  const url = `${baseUrl.replace(/\/+$/, "")}/sessions/${encodeURIComponent(sessionId)}/done`;
  const headers = typeof apiKey === "string" ? { authorization: `Bearer ${apiKey}` } : {};
  try {
    const answer = await fetch(url, { method: "POST", headers, signal: AbortSignal.timeout(DONE_TIMEOUT_MS) });
    if (!answer.ok && answer.status !== 404) logger?.warn?.(`clawrl: ${url} answered ${answer.status}`);
    // 404: nothing of this session was served by clawrl
  } catch (error) {
    logger?.warn?.(`clawrl: ${url}: ${error.message}`);
  }
}

export default {
  id: "clawrl",
  name: "clawrl",
  description: "Session and turn type for clawrl",
  register(api) {
    const id = api.pluginConfig?.provider ?? "clawrl";
    const provider = api.config?.models?.providers?.[id];
    api.registerProvider({
      id,
      label: "clawrl",
      auth: [],
      wrapStreamFn: ({ streamFn }) =>
        streamFn &&
        ((model, context, options) =>
          streamFn(model, context, { ...options, headers: { ...options?.headers, ...headersOf(options?.requestId) } })),
    });
    api.on("before_prompt_build", (_event, context) => remember(context));
    if (provider?.baseUrl) {
      api.on("session_end", (event) =>
        // a compacted session goes on; one that a restart interrupts does too
        ["compaction", "shutdown", "restart"].includes(event.reason) ? undefined : end(event.sessionId, provider, api.logger),
      );
    }
  },
};
