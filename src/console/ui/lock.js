// Turns off the actions of the page while no PRIMARY answers, each with the reason, and turns them on again. Must never
// press, hide or move anything. Buttons that ask nothing of the cluster carry data-local, and stay on.

import { live } from './live.js';
import { toast } from './parts.js';

const REASON = 'Off: no PRIMARY answers. It works again as soon as one does.';
const ACTIONS = ['main button', 'dialog button', '#top .button:not(.menu)'].map((place) => `${place}:not([data-local])`).join();
const DOWNLOADS = 'main a[href^="/api/"]';

function lock() {
  for (const action of document.querySelectorAll(ACTIONS)) {
    // A button that was off before has a reason of its own.
    if (action.disabled) continue;
    action.disabled = true;
    action.dataset.off = action.title;
    action.title = REASON;
  }
  for (const link of document.querySelectorAll(DOWNLOADS)) link.setAttribute('aria-disabled', 'true');
}

function unlock() {
  for (const action of document.querySelectorAll('[data-off]')) {
    action.disabled = false;
    if (action.dataset.off) action.title = action.dataset.off;
    else action.removeAttribute('title');
    delete action.dataset.off;
  }
  for (const link of document.querySelectorAll('a[aria-disabled]')) link.removeAttribute('aria-disabled');
}

// Called whenever the page becomes stale or fresh.
export function follow() {
  document.body.classList.toggle('stale', live.stale);
  if (live.stale) lock();
  else unlock();
}

// Turns off what is drawn or turned on meanwhile, before anybody sees it.
new MutationObserver(() => live.stale && lock()).observe(document.body, {
  subtree: true, childList: true, attributes: true, attributeFilter: ['disabled'],
});

document.addEventListener('click', (event) => {
  if (!live.stale || !event.target.closest?.(DOWNLOADS)) return;
  event.preventDefault();
  toast(REASON, 'bad');
}, true);
