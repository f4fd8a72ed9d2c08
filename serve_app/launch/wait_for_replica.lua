-- With no replica up, a request waits here, a bounded time. When one comes up, Ray Serve reloads
-- HAProxy, and this worker passes the request on to the one that knows the new replica.

local WAIT_S = tonumber(os.getenv("SERVE_APP_REPLICA_TIMEOUT_S") or "30")
local LOOK_MS = 100

local waking = false

-- Where an application is scaled to zero, Ray Serve starts a replica once a request waits at Ray
-- Serve's own proxy. One such request at a time is enough; a replica answers it.
local function wake(prefix)
    local host, port = core.backends.fallback.servers.fallback:get_addr():match("^(.*):(%d+)$")
    local socket = core.tcp()
    socket:settimeout(WAIT_S)
    if socket:connect(host, tonumber(port)) then
        local path = prefix:match("^(.-)/?$") .. "/health"
        socket:send("GET " .. path .. " HTTP/1.0\r\nhost: fallback\r\n\r\n")
        socket:receive("*l")
    end
    socket:close()
    waking = false
end

core.register_action("await_replica", { "http-req" }, function(txn, backend)
    local deadline_s = core.now().sec + WAIT_S
    -- `stopping` is 0 or 1, and Lua takes either for true.
    while txn.f:nbsrv(backend) == 0 and txn.f:stopping() == 0 and core.now().sec < deadline_s do
        if core.backends.fallback.servers.fallback and not waking then
            waking = true
            core.register_task(wake, txn:get_var("txn.prefix"))
        end
        core.msleep(LOOK_MS)
    end
end, 1)
