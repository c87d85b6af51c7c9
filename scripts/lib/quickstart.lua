-- wrk -s quickstart.lua URL -- REQUESTS FILE
-- Gets one object over and over, compares every body with FILE and counts which node answered. After REQUESTS
-- requests, or some seconds, it asks for nothing more, so that wrk ends with no response on its way: wrk would
-- reset such a connection.

local SECONDS = 3

local threads = {}

function setup(thread)
	table.insert(threads, thread)
end

function init(args)
	limit = tonumber(args[1])
	original = assert(io.open(args[2], "rb")):read("*a")
	begun = nil
	asked, answered, wrong, unknown = 0, 0, 0, 0
	host, t1, t2 = 0, 0, 0
end

function delay()
	begun = begun or os.time()
	if asked >= limit or os.time() - begun >= SECONDS then
		return 3600 * 1000
	end
	asked = asked + 1
	return 0
end

function response(status, headers, body)
	answered = answered + 1
	if status ~= 200 or body ~= original then
		wrong = wrong + 1
	end
	local node = headers["X-Node"]
	if node == "host" then
		host = host + 1
	elseif node == "t1" then
		t1 = t1 + 1
	elseif node == "t2" then
		t2 = t2 + 1
	else
		unknown = unknown + 1
	end
end

function done(summary)
	local errors = summary.errors
	print("xo-result broken " .. errors.connect + errors.read + errors.write + errors.timeout)
	for _, name in ipairs({ "asked", "answered", "wrong", "unknown", "host", "t1", "t2" }) do
		local sum = 0
		for _, thread in ipairs(threads) do
			sum = sum + thread:get(name)
		end
		print("xo-result " .. name .. " " .. sum)
	end
end
