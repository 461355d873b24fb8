// The words and figures of the page. Pure: from values to text.

const STATES = {
  PRIMARY: 'serves the Console',
  SECONDARY: 'replicates, ready to take over',
  WAITING: 'waits to become the seed of a pool, or to be added to one',
  REQUEST_JOIN: 'asks to join, waits for APPLY',
  STARTUP: 'starts',
  STARTUP2: 'fetches the database, has no vote yet',
  RECOVERING: 'its database is being restored',
  ROLLBACK: 'discards writes that were never acknowledged',
  DOWN: 'unavailable',
  UNKNOWN: 'not heard from yet',
  REMOVED: 'no longer a member',
};

// What a state means, in words.
export function stateWords(state) {
  return STATES[state] ?? '';
}

// good, busy (it will pass by itself), bad, or asking.
export function stateKind(state) {
  if (state === 'PRIMARY' || state === 'SECONDARY') return 'good';
  if (state === 'REQUEST_JOIN') return 'asking';
  return ['DOWN', 'UNKNOWN', 'REMOVED'].includes(state) ? 'bad' : 'busy';
}

export const ROLES = {
  admin: 'Administrator',
  operator: 'Operator',
  auditor: 'Auditor',
  defenderManager: 'Defender Manager',
};

export function count(number, one, many = `${one}s`) {
  return `${Number(number).toLocaleString('en')} ${number === 1 ? one : many}`;
}

export function bytes(number) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  let value = number;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

// A span of time, in words for people.
export function span(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 100_000) return `${(ms / 1000).toFixed(ms < 10_000 ? 1 : 0)} s`;
  const minutes = Math.round(ms / 60_000);
  if (minutes < 120) return `${minutes} min`;
  const hours = Math.round(minutes / 60);
  return hours < 48 ? `${hours} h` : `${Math.round(hours / 24)} days`;
}

// When a member was last heard from. Reports come twice a second, so less than a second needs no figure.
export function lastContact(ms) {
  if (ms === null || ms === undefined) return 'never';
  return ms < 1000 ? 'just now' : `${span(ms)} ago`;
}

const two = (number) => String(number).padStart(2, '0');

// Local date and time in the same form everywhere: 2026-11-22 21:14:43. Takes seconds since 1970, or text.
export function time(value) {
  const date = new Date(typeof value === 'number' ? value * 1000 : value);
  if (Number.isNaN(date.getTime())) return String(value ?? '');
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
  return `${day} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

// The time of day alone: 21:14:43. Takes milliseconds since 1970.
export function clock(ms) {
  return time(ms / 1000).slice(-8);
}

// How long ago something was, counted in whole seconds.
export function ago(ms) {
  return `${ms < 100_000 ? `${Math.floor(ms / 1000)} s` : span(ms)} ago`;
}

// What an empty list says. It claims to be empty only if that is known.
export function nothing(stale, loaded, empty) {
  if (stale) return 'Unknown: no PRIMARY answers.';
  return loaded ? empty : 'Loading …';
}

export function listed(names) {
  if (names.length < 2) return names.join('');
  return `${names.slice(0, -1).join(', ')} and ${names.at(-1)}`;
}

// How many members a complete cluster has. Older programs do not say so: their clusters have three.
export const sizeOf = (status) => status.membership.size ?? { least: 3, most: 3 };

// How many further failures the cluster survives, and why not more. `now` is in seconds since 1970.
export function tolerance(status, now) {
  const voters = status.members.filter((member) => member.voter);
  const up = voters.filter((member) => stateKind(member.state) === 'good');
  const majority = Math.floor(voters.length / 2) + 1;
  const pause = status.membership.pause;
  const paused = Boolean(pause && pause.until > now);
  const spare = Math.max(0, up.length - majority);
  return { paused, complete: status.members.length >= sizeOf(status).least, survives: paused ? 0 : spare };
}
