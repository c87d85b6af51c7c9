-- The requests of bench/wrk/run, of one thread and so of one connection: MOVES_EVERY PATH...
-- The connection asks for each of the paths MOVES_EVERY times before it goes on to the next; 0: for one path only.
local every, paths, i = 0, {}, -1

function init(arguments)
  every = tonumber(arguments[1])
  for n = 2, #arguments do
    paths[#paths + 1] = wrk.format("GET", arguments[n])
  end
end

function request()
  if every == 0 then
    return paths[1]
  end
  i = i + 1
  return paths[math.floor(i / every) % #paths + 1]
end
