-- Asks the door of a replica (lanes/door.py) about each request that could take the fast lane, and
-- says in variables of the transaction what HAProxy does with it:
--
--   txn.lane       fast, or not set: the full lane, which has gates of its own
--   txn.server     the replica, by its name in the backend
--   txn.host, txn.port, txn.token, txn.request_id, txn.timeout_ms    what the door grants
--   txn.headers    header lines for the answer, where the gates have any (x-ratelimit-*)
--   txn.await_body    the body is there, or the key is one that a door has accepted
--
-- A door that cannot be reached is a replica that cannot be reached: the full lane finds another
-- one, or says 503. A door that is reached and does not answer is a 503. No way leads to the Rust
-- front end but a grant.

local SECRET = os.getenv("SERVE_APP_LANE_SECRET")
-- A door answers within a millisecond, or says within half a second that the request waits.
local ANSWER_S = 5
-- A request is over sooner, by its own timeouts.
local HELD_S = 7 * 24 * 3600
-- How long it is not asked again whether a replica has a door, once it said that it has none.
local ABSENT_S = 5
-- How long the body of a request is awaited whose key no door has accepted yet.
local UNKNOWN_KEY_MS = 250
-- How many keys are remembered at most.
local MOST_KEYS = 10000
local UNAVAILABLE = '{"type":"error","error":{"message":"the server is too busy to answer; try again",'
    .. '"type":"server_error","param":null,"code":"unavailable"}}'

-- Of this thread, by the name of a server: the address of its door, since when it is known to have
-- none, and how many requests of this thread ask it now.
local doors, absent_s, asking = {}, {}, {}

-- Of this thread: the keys that doors have accepted, and how many they are. The door decides about
-- every request; these only say for whom it is worth waiting.
local accepted, accepted_count = {}, 0

local function key_of(txn)
    return (txn.sf:req_fhdr("authorization") or "") .. "\n" .. (txn.sf:req_fhdr("x-api-key") or "")
end

local function note_key(key, is_accepted)
    if is_accepted and not accepted[key] then
        if accepted_count >= MOST_KEYS then
            accepted, accepted_count = {}, 0
        end
        accepted[key], accepted_count = true, accepted_count + 1
    elseif not is_accepted and accepted[key] then
        accepted[key], accepted_count = nil, accepted_count - 1
    end
end

local function body_is_complete(txn)
    return #txn.sf:req_body() == tonumber(txn.sf:req_fhdr("content-length"))
end

local function connect(host, port, timeout_s)
    local socket = core.tcp()
    socket:settimeout(timeout_s)
    if socket:connect(host, tonumber(port)) then
        return socket
    end
end

-- The address of a replica's door, as its own server says; nil where it has none.
local function find_door(server, name, prefix)
    if doors[name] then
        return doors[name]
    end
    if absent_s[name] and core.now().sec < absent_s[name] + ABSENT_S then
        return nil
    end
    local host, port = server:get_addr():match("^(.*):(%d+)$")
    local socket, status, length = connect(host, port, 1), nil, nil
    if socket then
        socket:send("GET " .. prefix .. "/-/door HTTP/1.0\r\nhost: door\r\n")
        socket:send("x-door: " .. SECRET .. "\r\n\r\n")
        status = socket:receive("*l")
    end
    if status and status:match("^HTTP/%d.%d 200") then
        repeat
            local line = socket:receive("*l")
            length = line and line:lower():match("^content%-length: (%d+)") or length
        until not line or line == "" or line == "\r"
        local found = length and socket:receive(tonumber(length))
        if found and found:match("^.+:%d+$") then
            local door_host, door_port = found:match("^(.*):(%d+)$")
            doors[name] = { host = door_host, port = door_port }
        end
    end
    if socket then
        socket:close()
    end
    if not doors[name] then
        absent_s[name] = core.now().sec
    end
    return doors[name]
end

-- A request that asks a replica, until it is given back. HAProxy ends this action where it waits
-- when the client leaves, and then collects what it held.
local function give_back(ticket)
    if ticket.name then
        asking[ticket.name] = asking[ticket.name] - 1
        ticket.name = nil
    end
end

local Ticket = { __gc = give_back }

local function count(name)
    asking[name] = (asking[name] or 0) + 1
    return setmetatable({ name = name }, Ticket)
end

-- How many requests a replica has from this HAProxy: in both lanes, and at its door.
local function outstanding(txn, backend, name)
    return txn.f:srv_conn(backend .. "/" .. name)
        + txn.f:srv_conn(backend .. "-fast/" .. name)
        + (asking[name] or 0)
end

-- The replicas that are up, the one with the fewest requests first.
local function ranked(txn, backend)
    local names, load = {}, {}
    for name, _ in pairs(core.backends[backend].servers) do
        local up = txn.f:srv_is_up(backend .. "/" .. name)
        if up == true or up == 1 then
            names[#names + 1] = name
            load[name] = outstanding(txn, backend, name) + math.random()
        end
    end
    table.sort(names, function(a, b) return load[a] < load[b] end)
    return names
end

-- The first line of the door's answer; nil if there is none in time.
local function answer_of(socket)
    local line = socket:receive("*l")
    local wait_s = line and line:match("^wait (%S+)")
    if wait_s then
        socket:settimeout(math.ceil(tonumber(wait_s)) + ANSWER_S)
        line = socket:receive("*l")
    end
    return line
end

-- Calls `add` with the name and value of each header line.
local function each_header(lines, add)
    for name, value in lines:gmatch("([^:\r\n]+): ([^\r\n]*)\r\n") do
        add(name, value)
    end
end

local function refuse(txn, socket, line)
    local status, header_bytes, body_bytes = line:match("^refuse (%d+) (%d+) (%d+)")
    local headers = socket:receive(tonumber(header_bytes)) or ""
    local body = tonumber(body_bytes) > 0 and socket:receive(tonumber(body_bytes)) or ""
    socket:close()
    local reply = txn:reply()
    reply:set_status(tonumber(status))
    each_header(headers, function(name, value)
        if name:lower() ~= "content-length" then
            reply:add_header(name, value)
        end
    end)
    reply:set_body(body)
    txn:done(reply)
end

local function unavailable(txn)
    local reply = txn:reply()
    reply:set_status(503)
    reply:add_header("content-type", "application/json")
    reply:add_header("retry-after", "1")
    reply:set_body(UNAVAILABLE)
    txn:done(reply)
end

-- Ask one replica. Returns false where it cannot be reached.
local function ask(txn, name, door, request)
    local ticket = count(name)
    local socket = connect(door.host, door.port, ANSWER_S)
    if not socket then
        doors[name], absent_s[name] = nil, core.now().sec
        give_back(ticket)
        return false
    end
    socket:send(request)
    local line = answer_of(socket)
    give_back(ticket)
    if not line then
        unavailable(txn)
    end
    note_key(key_of(txn), not line:match("^refuse 401 "))
    local host, port, token, request_id, timeout_ms, header_bytes =
        line:match("^fast (%S+) (%S+) (%S+) (%S+) (%S+) (%d+)")
    if host then
        local headers = header_bytes ~= "0" and socket:receive(tonumber(header_bytes))
        if headers then
            txn:set_var("txn.headers", headers)
        end
        -- The connection is the request's place in the engine. HAProxy closes it when the
        -- transaction ends, whatever ends it, and not because nothing is said on it meanwhile.
        socket:settimeout(HELD_S)
        txn:set_priv(socket)
        txn:set_var("txn.lane", "fast")
        txn:set_var("txn.host", host)
        txn:set_var("txn.port", tonumber(port))
        txn:set_var("txn.token", token)
        txn:set_var("txn.request_id", request_id)
        txn:set_var("txn.timeout_ms", tonumber(timeout_ms))
    elseif line:match("^refuse") then
        refuse(txn, socket, line)
    else
        socket:close()
    end
    txn:set_var("txn.server", name)
    return true
end

-- A request whose body has not arrived yet. With a key that is not known to be accepted it gets a
-- moment, and then takes the full lane, whose gate refuses a wrong key without the body.
core.register_action("await_body", { "http-req" }, function(txn)
    local is_accepted, waited_ms = accepted[key_of(txn)], 0
    while not is_accepted and not body_is_complete(txn) do
        if waited_ms >= UNKNOWN_KEY_MS then
            return
        end
        local pause_ms = math.max(1, math.floor(waited_ms / 4))
        core.msleep(pause_ms)
        waited_ms = waited_ms + pause_ms
    end
    txn:set_var("txn.await_body", true)
end)

core.register_action("door", { "http-req" }, function(txn, backend)
    if not body_is_complete(txn) then
        return
    end
    local body = txn.sf:req_body()
    -- Of the application: empty where it is /.
    local prefix = txn:get_var("txn.prefix"):match("^(.-)/?$")
    local path = txn.sf:path():sub(#prefix + 1)
    local request = txn.sf:method() .. " " .. path .. " HTTP/1.1\r\nx-door: " .. SECRET
        .. "\r\n" .. txn.sf:req_hdrs() .. body
    for _, name in ipairs(ranked(txn, backend)) do
        local door = find_door(core.backends[backend].servers[name], name, prefix)
        if door and ask(txn, name, door, request) then
            return
        end
    end
end, 1)

-- The answer of the Rust front end gets the headers that the gates have for the client.
core.register_action("add_headers", { "http-res" }, function(txn)
    each_header(txn:get_var("txn.headers"), function(name, value)
        txn.http:res_set_header(name, value)
    end)
end)

-- The Rust front end refused what the door had let in.
core.register_action("answered", { "http-res" }, function(txn)
    local socket = txn:get_priv()
    if socket then
        socket:send("status " .. txn.sf:status() .. "\n")
    end
end)
