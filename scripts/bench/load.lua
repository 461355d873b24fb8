-- What wrk sends for all.sh: writes with a name of their own each, to twistlockd (OURS=1, AUTHORIZATION: the session; DESCRIPTION:
-- how many characters to fill the database with) or to etcd.
-- Must cost little: it shares the processors with what it measures.
local ours, session = os.getenv("OURS") == "1", os.getenv("AUTHORIZATION")
local threads, number, prefix = 0, 0, ""

function setup(thread)
    thread:set("id", threads)
    threads = threads + 1
end

local letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
-- Base64 of a text whose length is a multiple of three.
local function base64(text)
    return (text:gsub("...", function(three)
        local a, b, c = three:byte(1, 3)
        local bits, out = a * 65536 + b * 256 + c, ""
        for _ = 1, 4 do
            out = letters:sub(bits % 64 + 1, bits % 64 + 1) .. out
            bits = math.floor(bits / 64)
        end
        return out
    end))
end

-- Each three digits of a number, encoded once.
local digits = {}
local length = tonumber(os.getenv("DESCRIPTION") or "0")
local description = length > 0 and string.rep("\228\189\160\229\165\189", length / 2) or "one of many"
local value = base64("#336699 one of many..")

function init()
    for i = 0, 999 do
        digits[i] = base64(string.format("%03d", i))
    end
    -- Twelve characters: ten digits of the time in seconds, the thread, a dash.
    prefix = string.format("%010d%d-", os.time(), id)
    if not ours then
        prefix = base64(prefix)
    end
end

local headers = { ["Content-Type"] = "application/json", ["Authorization"] = ours and session or nil }

function request()
    number = number + 1
    if ours then
        local body = '{"name":"' .. prefix .. number .. '","color":"#336699","description":"' .. description .. '"}'
        return wrk.format("POST", "/api/v1/tags", headers, body)
    end
    local key = prefix
    for _, unit in ipairs({ 1000000, 1000, 1 }) do
        key = key .. digits[math.floor(number / unit) % 1000]
    end
    return wrk.format("POST", "/v3/kv/put", headers, '{"key":"' .. key .. '","value":"' .. value .. '"}')
end

-- Whatever is not a success is counted apart.
function done(summary, latency)
    local errors, failed = summary.errors, 0
    for _, kind in ipairs({ "status", "connect", "read", "write", "timeout" }) do
        failed = failed + errors[kind]
    end
    io.write(string.format("RESULT %d %d %.3f %.3f %d\n", summary.requests, summary.duration, latency:percentile(50) / 1e3,
        latency:percentile(99) / 1e3, failed))
end
