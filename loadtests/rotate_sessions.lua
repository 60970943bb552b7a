-- Posts one body under SESSIONS session ids in rotation.
-- wrk -s rotate_sessions.lua URL -- BODY_FILE SESSIONS PREFIX

local requests = {}
local last = 0

function init(args)
  local file = assert(io.open(args[1], "rb"))
  local body = file:read("*a")
  file:close()
  for i = 1, tonumber(args[2]) do
    local headers = { ["content-type"] = "application/json", ["x-session-id"] = args[3] .. i }
    requests[i] = wrk.format("POST", wrk.path, headers, body)
  end
end

function request()
  last = last % #requests + 1
  return requests[last]
end

-- Prints one machine-readable line, as wrk's own output is rounded. Times are in microseconds.
function done(summary, latency, _)
  local e = summary.errors
  io.write(string.format(
    'RESULT {"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "failed": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
