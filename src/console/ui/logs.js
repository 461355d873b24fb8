// Manage > View Logs: the audit log of all changes and logins, and the last lines of the Console's log.

import { get, list } from './api.js';
import { h, show } from './dom.js';
import { live } from './live.js';
import { button, card, page, table, when } from './parts.js';
import { nothing, time } from './words.js';

const ROWS = 50;
const LINES = 500;
const COLUMNS = [['When', 'time-column'], ['User', 'user-column'], ['From', 'user-column'], ['What', 'what-column'], ['Difference', 'wide-column']];

function difference(value) {
  if (value === null || value === undefined) return '';
  if (typeof value !== 'object') return String(value);
  const text = (part) => (part === null || part === undefined ? 'nothing' : part === '' ? 'empty' : typeof part === 'string' ? part : JSON.stringify(part));
  const lines = Object.entries(value).map(([name, change]) =>
    h('div', {}, h('span', { class: 'quiet' }, `${name}: `), change?.old === undefined && change?.new === undefined
      ? text(change) : `${text(change.old)} → ${text(change.new)}`),
  );
  return lines.length > 0 && h('div', { class: 'difference' }, lines);
}

function row(audit) {
  // An operation that has begun and not ended is not ok, but has not failed.
  const outcome = audit.ok ? null : audit.outcome ?? 'failed';
  return {
    key: `audit-${audit.id}`,
    kind: outcome && outcome !== 'begun' ? 'row-down' : null,
    cells: [
      when(audit.time),
      audit.user,
      h('span', { class: 'mono' }, audit.source),
      [`${audit.action} ${audit.what}`, outcome && h('strong', {}, ` ${outcome}`)],
      difference(audit.difference),
    ],
  };
}

export function history(root) {
  // `cursors`: those of the pages from the second one to this one.
  const state = { rows: null, total: 0, next: null, cursors: [], problem: null };
  function draw() {
    const empty = state.problem ?? nothing(live.stale, state.rows, 'Nothing yet.');
    const rows = state.rows ?? [];
    const { total, next, cursors } = state;
    const above = cursors.length * ROWS;
    const pager = h(
      'div',
      { class: 'buttons pager' },
      button('Newer', () => load(cursors.slice(0, -1)), { disabled: cursors.length === 0 }),
      h('span', { class: 'quiet' }, rows.length > 0 ? `${above + 1} to ${above + rows.length}${total ? ` of ${total}` : ''}` : ''),
      button('Older', () => load([...cursors, next]), { disabled: !next }),
      h('a', { class: 'button', href: '/api/v1/audits/mgmt?format=csv', download: true }, 'Download as CSV'),
    );
    show(
      root,
      page('History', 'Every change and every login, successful or not.', card('Audit', {}, table('Audit', COLUMNS, rows.map(row), empty), pager)),
    );
  }
  async function load(cursors) {
    try {
      const { rows, total, next } = await list('/audits/mgmt', ROWS, cursors.at(-1));
      // Only the first page says how many there are.
      Object.assign(state, { rows, next, cursors, total: total || state.total, problem: null });
    } catch (error) {
      state.problem = error.message;
    }
    draw();
  }
  draw();
  load([]);
  return { draw, load: () => load(state.cursors) };
}

export function consoleLog(root) {
  let text = null;
  function draw() {
    show(
      root,
      page(
        'Console log',
        `The last ${LINES} lines of the daemon on this host.`,
        h('div', { class: 'buttons' }, button('Refresh', load)),
        h('pre', { class: 'log', tabindex: 0, 'aria-label': 'Console log' }, text ?? nothing(live.stale, false)),
      ),
    );
  }
  async function load() {
    try {
      const lines = await get(`/logs/console?lines=${LINES}`);
      text = lines.map((line) => `${time(line.time_ms / 1000)} ${line.level.padEnd(5)} ${line.text}`).join('\n');
    } catch (error) {
      text = error.message;
    }
    draw();
    const log = root.querySelector('.log');
    log.scrollTop = log.scrollHeight;
  }
  draw();
  load();
  return { draw, load };
}
