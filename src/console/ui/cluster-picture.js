// The picture of the cluster, and the small chart of a member's lag. Pure: from a status to SVG.

import { s } from './dom.js';
import { count, listed, sizeOf, stateKind } from './words.js';

const NODE = { width: 104, height: 60, top: 84 };
const PLACE = NODE.width + 16;
const SHORT = 12;

// Text that is cut to fit: SVG does not clip it.
function shortened(text, length) {
  const letters = [...text];
  return letters.length <= length ? text : `${letters.slice(0, length - 1).join('')}…`;
}

// The first part of a host name. An address stays whole.
function host(name) {
  return shortened(/[a-z]/i.test(name) ? name.split('.')[0] : name, SHORT);
}

// What is in each place: members by rank, then hosts that ask to join, then nobody. Without a PRIMARY, no state is
// known.
function places(status, stale) {
  const members = status.members.map(({ name, state, id, lag, voter }) => ({ name, state: stale ? 'UNKNOWN' : state, id, lag, voter }));
  const asking = (status.membership.requests ?? []).map(({ name }) => ({ name, state: 'REQUEST_JOIN' }));
  const { least, most } = sizeOf(status);
  const taken = [...members, ...asking].slice(0, most);
  return [...taken, ...Array(Math.max(0, least - taken.length)).fill({ name: 'free place', state: null })];
}

const left = (at) => 8 + at * PLACE;
const middle = (at) => left(at) + NODE.width / 2;

function box(place, at) {
  const kind = place.state ? `${stateKind(place.state)} ${place.state.toLowerCase()}` : 'free';
  const y = NODE.top;
  return s(
    'g',
    { class: `node ${kind}` },
    s('title', {}, place.state ? `${place.name}: ${place.state}` : 'No host yet'),
    s('rect', { x: left(at), y, width: NODE.width, height: NODE.height, rx: 9 }),
    s('text', { x: middle(at), y: y + 26, class: 'name' }, place.state ? host(place.name) : place.name),
    place.state && s('text', { x: middle(at), y: y + 45, class: 'state' }, place.state),
  );
}

function clientsLink(primary, width) {
  const x = middle(primary);
  return s(
    'g',
    { class: 'clients-link' },
    s('path', { d: `M${width / 2} 40 C ${width / 2} 62, ${x} 54, ${x} ${NODE.top - 7}` }),
    s('path', { d: `M${x - 4} ${NODE.top - 10} L${x} ${NODE.top - 2} L${x + 4} ${NODE.top - 10} Z`, class: 'head' }),
  );
}

// The line from the primary to another member, below the boxes.
function copyLink(primary, to, place) {
  const [from, end] = [middle(primary), middle(to)];
  const base = NODE.top + NODE.height;
  const depth = base + (Math.abs(primary - to) > 1 ? 52 : 32);
  const broken = stateKind(place.state) === 'bad';
  const label = broken ? 'no contact' : place.lag === 0 ? 'in step' : `${place.lag.toLocaleString('en')} behind`;
  return s(
    'g',
    { class: `copy-link ${broken ? 'broken' : ''}` },
    s('path', { d: `M${from} ${base} C ${from} ${depth}, ${end} ${depth}, ${end} ${base + 6}` }),
    s('path', { d: `M${end - 4} ${base + 8} L${end} ${base + 1} L${end + 4} ${base + 8} Z`, class: 'head' }),
    s('text', { x: end, y: base + 54 }, label),
  );
}

function spoken(all, primary) {
  const parts = all.filter((place) => place.state).map((place) => `${place.name} is ${place.state}`);
  const free = all.filter((place) => !place.state).length;
  if (free > 0) parts.push(`${count(free, 'place is', 'places are')} free`);
  return `Clients reach ${primary < 0 ? 'nobody, as far as is known' : all[primary].name}. ${listed(parts)}.`;
}

export function picture(status, { searching, stale }) {
  const all = places(status, stale);
  const width = all.length * PLACE;
  const primary = searching ? -1 : all.findIndex((place) => place.state === 'PRIMARY');
  const links = all.map((place, at) =>
    primary >= 0 && at !== primary && place.id !== undefined ? copyLink(primary, at, place) : null,
  );
  return s(
    'svg',
    { class: 'picture', viewBox: `0 0 ${width} 208`, role: 'img', 'aria-label': spoken(all, primary) },
    s('rect', { x: width / 2 - 52, y: 10, width: 104, height: 28, rx: 14, class: 'clients' }),
    s('text', { x: width / 2, y: 28.5, class: 'name' }, 'clients'),
    primary >= 0 && clientsLink(primary, width),
    links,
    all.map(box),
  );
}

// The last minute of a member's lag. A gap is a time without contact.
export function chart(samples) {
  const [width, height] = [96, 22];
  const most = Math.max(10, ...samples.map((lag) => lag ?? 0));
  const step = width / 119;
  const x = (at) => (width - (samples.length - 1 - at) * step).toFixed(1);
  let path = '';
  let pen = 'M';
  samples.forEach((lag, at) => {
    if (lag === null) {
      pen = 'M';
      return;
    }
    path += `${pen}${x(at)} ${(height - 2 - (lag / most) * (height - 4)).toFixed(1)}`;
    pen = 'L';
  });
  const label = `Lag of the last minute: at most ${count(Math.max(0, ...samples.map((lag) => lag ?? 0)), 'transaction')}`;
  return s(
    'svg',
    { class: 'chart', viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label },
    s('title', {}, label),
    s('path', { d: `M0 ${height - 2}H${width}`, class: 'base' }),
    path && s('path', { d: path, class: 'line' }),
  );
}
