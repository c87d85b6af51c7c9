-- Requests for objects by popularity, of one thread and so of one connection: SEED PREFIX COUNT EXPONENT.
-- Objects are numbers from 0; the n-th is asked for in proportion to 1 / n^EXPONENT.
local requests, chances = {}, {}
local threads = 0

function setup(thread)
  threads = threads + 1
  thread:set("number", threads)
end

function init(arguments)
  local seed, prefix, count, exponent = tonumber(arguments[1]), arguments[2], tonumber(arguments[3]), tonumber(arguments[4])
  math.randomseed(seed * 1000 + number)
  local sum = 0
  for n = 1, count do
    sum = sum + 1 / n ^ exponent
    chances[n] = sum
    requests[n] = wrk.format("GET", prefix .. (n - 1))
  end
  for n = 1, count do
    chances[n] = chances[n] / sum
  end
end

function request()
  local chance, low, high = math.random(), 1, #chances
  while low < high do
    local middle = math.floor((low + high) / 2)
    if chances[middle] < chance then
      low = middle + 1
    else
      high = middle
    end
  end
  return requests[low]
end
